"""`ensemble serve`: an ensemble on this machine, from its file to its last answer, with processes instead of pods.

The same sequence as in a cluster: devices, profiles, plan, processes. What decides is pure and elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ensemble_operator.addresses import AddressUnavailable, free_tcp_address
from ensemble_operator.fleet import GatewayState
from ensemble_operator.keys import write_keys
from ensemble_operator.serve.applying import Applier, plan_to_serve
from ensemble_operator.serve.change import allocation_of
from ensemble_operator.serve.control_socket import ControlApi, listening, socket_path
from ensemble_operator.serve.curl import curl_line
from ensemble_operator.serve.deployment import Deployment, Place
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.observation import Rates, progress, rates
from ensemble_operator.serve.preparation import Planned, ServeOptions, check_quorum, prepare
from ensemble_operator.serve.runtime_folder import runtime_folder
from ensemble_operator.serve.summary import change_lines
from ensemble_operator.serve.trying import tried
from ensemble_operator.tables import allocation_table

GENERATION = 1
STARTING_PERIOD_S = 0.1
SERVING_PERIOD_S = 1.0
# Rates are of so many periods.
LOOKS = 5

ResultT = TypeVar("ResultT")


class Stopped(Exception):
    """The user asked to stop."""


class StopRequest:
    """A user's wish to stop, in two degrees: drain, then, asked again, at once."""

    def __init__(self) -> None:
        self._drain, self._now = asyncio.Event(), asyncio.Event()

    def ask(self) -> None:
        """Stop, or, asked before, stop at once."""
        (self._now if self._drain.is_set() else self._drain).set()

    async def during(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of some work.

        Raises Stopped, the work cancelled, if the user wants to stop before it is done.
        """
        return await _race(work, self._drain)

    async def unless_at_once(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of a drain.

        Raises Stopped, the drain cancelled, if the user does not want to wait for it.
        """
        return await _race(work, self._now)


async def serve(options: ServeOptions, screen: Screen, stop: StopRequest) -> None:
    """Serve the ensemble in a file until asked to stop; whatever was started has ended when this returns or raises.

    Raises an EnsembleError or AllocationError that says what is wrong, or OSError if no private folder can be made.
    """
    try:
        planned = await stop.during(prepare(options, screen))
        if planned.ensemble.spec.planning.evaluate == "live":
            planned = await stop.during(tried(planned, options, screen))
    except Stopped:
        return
    with runtime_folder(options.runtime_base) as folder, _listening(options, planned, screen) as listener:
        deployment = make_deployment(planned, options, folder, screen)
        try:
            screen.note(f"starting the gateway and {len(planned.matrix.devices)} workers")
            deployment.start()
            await stop.during(_serve(deployment, planned, options, screen, listener))
        except Stopped:
            screen.hide()
            screen.note("stopping: requests in flight are answered first; once more to stop at once")
        finally:
            try:
                await stop.unless_at_once(deployment.stop())
            except Stopped:
                deployment.kill()
                await deployment.stop()


def make_deployment(planned: Planned, options: ServeOptions, folder: Path, screen: Screen) -> Deployment:
    """The processes that serve a plan, not started yet; they meet in `folder`."""
    shared = options.link == "shared"
    addresses = {
        name: f"unix:{folder / name}.data" if shared else free_tcp_address() for name in planned.matrix.devices
    }
    keys = None
    if not shared and options.encryption == "curve":
        keys = folder / "keys"
        write_keys(keys)
    place = Place(folder, options.cache_folder / "models", keys, options.host, options.port, options.log_level)
    return Deployment(planned.devices, plan_to_serve(planned, addresses, GENERATION), place, screen.wrote)


async def until_settled(deployment: Deployment, planned: Planned, screen: Screen) -> tuple[GatewayState, list[str]]:
    """Wait until every member answers or has failed for good; the gateway's state then, and those that have failed.

    Raises ModelUnavailable if too few members come to answer.
    """
    members = [m.name for m in planned.ensemble.spec.members]
    told = set(planned.unloadable)
    while True:
        observed = await deployment.observe()
        state = progress(members, planned.placed, planned.unloadable, observed)
        check_quorum(planned.ensemble, state.failed, planned.sources)
        for name in state.failed.keys() - told:
            told.add(name)
            screen.warn(f"served without {name}: {state.failed[name]}")
        if state.settled and observed.gateway is not None:
            return observed.gateway, [name for name in members if name in state.failed]
        screen.show(deployment.view(observed, Rates()))
        await asyncio.sleep(STARTING_PERIOD_S)


@contextlib.contextmanager
def _listening(options: ServeOptions, planned: Planned, screen: Screen) -> Iterator[socket.socket | None]:
    """The socket for `ensemble apply`; None where its usual place is taken: to serve is what was asked for.

    Raises AddressUnavailable if the place was asked for.
    """
    with contextlib.ExitStack() as stack:
        listener = None
        path = options.socket or socket_path(planned.ensemble.name, options.runtime_base)
        try:
            listener = stack.enter_context(listening(path))
        except AddressUnavailable as error:
            if options.socket is not None:
                raise
            screen.warn(f"`ensemble apply` cannot change this server: {error}")
        yield listener


async def _serve(
    deployment: Deployment, planned: Planned, options: ServeOptions, screen: Screen, listener: socket.socket | None
) -> None:
    """Wait until it answers, say so, then watch it, and let it be changed, for as long as it serves.

    Raises ModelUnavailable if too few members come to answer.
    """
    state, failed = await until_settled(deployment, planned, screen)
    _say_ready(planned, state.url, failed, screen)
    control = ControlApi(deployment, Applier(deployment, planned, options), screen)
    async with control.served(listener) if listener is not None else contextlib.nullcontext():
        await _watch(deployment, control, state, screen)


async def _watch(deployment: Deployment, control: ControlApi, state: GatewayState, screen: Screen) -> None:
    """Show how it goes, over the last seconds, and what was changed."""
    clock = asyncio.get_running_loop().time
    looks: deque[tuple[float, GatewayState | None]] = deque([(clock(), state)], LOOKS)
    while True:
        await asyncio.sleep(SERVING_PERIOD_S)
        while not control.changes.empty():
            screen.hide()
            screen.result(*change_lines(control.changes.get_nowait()))
        observed, now = await deployment.observe(), clock()
        then, before = looks[0]
        screen.show(deployment.view(observed, rates(before, observed.gateway, now - then)))
        looks.append((now, observed.gateway))


def _say_ready(planned: Planned, url: str, failed: list[str], screen: Screen) -> None:
    allocation, tensors = allocation_of(planned), planned.tensors
    name = planned.ensemble.name
    screen.result(
        allocation_table(planned.matrix, allocation.used_bytes, allocation.capacity_bytes, failed),
        f"{name} is served at {url}/v2/models/{name}",
        f"try: {curl_line(url, name, tensors.inputs, tensors.outputs)}",
    )


async def _race(work: Coroutine[Any, Any, ResultT], event: asyncio.Event) -> ResultT:
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Stopped
    finally:
        waiting.cancel()
        task.cancel()
        # What the work cleans up is part of it.
        await asyncio.wait([task])
