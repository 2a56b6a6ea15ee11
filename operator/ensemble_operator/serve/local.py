"""`ensemble serve`: an ensemble on this machine, from its file to its last answer, with processes instead of pods.

The same sequence as in a cluster: devices, profiles, plan, processes. What decides is pure and elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ensemble_operator.addresses import free_tcp_address
from ensemble_operator.allocation.memory import used_bytes
from ensemble_operator.fleet import GatewayState
from ensemble_operator.keys import write_keys
from ensemble_operator.plans import gateway_plan, worker_plans
from ensemble_operator.serve.curl import curl_line
from ensemble_operator.serve.deployment import Deployment, Place
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.observation import Rates, progress, rates
from ensemble_operator.serve.preparation import ROW_CACHE_BYTES, Planned, ServeOptions, check_quorum, prepare
from ensemble_operator.serve.runtime_folder import runtime_folder
from ensemble_operator.tables import allocation_table

GENERATION = 1
STARTING_PERIOD_S = 0.1
SERVING_PERIOD_S = 1.0

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
    except Stopped:
        return
    with runtime_folder(options.runtime_base) as folder:
        deployment = _deployment(planned, options, folder, screen)
        try:
            screen.note(f"starting the gateway and {len(planned.matrix.devices)} workers")
            deployment.start()
            await stop.during(_serve(deployment, planned, screen))
        except Stopped:
            screen.hide()
            screen.note("stopping: requests in flight are answered first; once more to stop at once")
        finally:
            try:
                await stop.unless_at_once(deployment.stop())
            except Stopped:
                deployment.kill()
                await deployment.stop()


def _deployment(planned: Planned, options: ServeOptions, folder: Path, screen: Screen) -> Deployment:
    shared = options.link == "shared"
    addresses = {
        name: f"unix:{folder / name}.data" if shared else free_tcp_address() for name in planned.matrix.devices
    }
    name = planned.ensemble.name
    plans = worker_plans(name, GENERATION, planned.matrix, planned.sources, planned.tensors, ROW_CACHE_BYTES)
    gateway = gateway_plan(planned.ensemble, GENERATION, planned.sources, planned.tensors, addresses)
    keys = None
    if not shared and options.encryption == "curve":
        keys = folder / "keys"
        write_keys(keys)
    place = Place(folder, options.cache_folder / "models", keys, options.host, options.port, options.log_level)
    return Deployment(planned.devices, plans, gateway, place, screen.wrote)


async def _serve(deployment: Deployment, planned: Planned, screen: Screen) -> None:
    """Wait until it answers, say so, then watch it for as long as it serves.

    Raises ModelUnavailable if too few members come to answer.
    """
    state, failed = await _until_settled(deployment, planned, screen)
    _say_ready(planned, state.url, failed, screen)
    clock = asyncio.get_running_loop().time
    before: GatewayState | None = state
    then = clock()
    while True:
        await asyncio.sleep(SERVING_PERIOD_S)
        observed, now = await deployment.observe(), clock()
        screen.show(deployment.view(observed, rates(before, observed.gateway, now - then)))
        before, then = observed.gateway, now


async def _until_settled(deployment: Deployment, planned: Planned, screen: Screen) -> tuple[GatewayState, list[str]]:
    """Wait until every member answers or has failed for good; the gateway's state then, and those that have failed."""
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


def _say_ready(planned: Planned, url: str, failed: list[str], screen: Screen) -> None:
    overheads = {d.name: d.overhead_bytes for d in planned.problem.devices}
    used = dict(zip(planned.matrix.devices, used_bytes(planned.problem, planned.matrix).tolist(), strict=True))
    taken = {name: used[name] + overheads[name] for name in used}
    capacity = {d.name: d.capacity_bytes for d in planned.problem.devices}
    name, tensors = planned.ensemble.name, planned.tensors
    screen.result(
        allocation_table(planned.matrix, taken, capacity, failed),
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
