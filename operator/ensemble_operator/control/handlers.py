"""Every kopf decorator. An event of an InferenceEnsemble is passed on, and nothing else: no finalizer, no patch.

kopf runs in a thread with a loop of its own, because it takes a loop for itself: it sets signal handlers, and at its
end cancels all tasks that it does not know.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import kopf

from ensemble_operator.control.credentials import Access
from ensemble_operator.control.errors import Forbidden
from ensemble_operator.control.kinds import ENSEMBLE, FIELD_MANAGER, Manifest

log = logging.getLogger(__name__)

# Short, so that a server that is back is noticed; few, so that a refusal is told.
ERROR_BACKOFFS_S = (0.5, 1.0, 2.0)
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 4.0
END_S = 10.0
CLOSE_S = 0.25

ResultT = TypeVar("ResultT")
Seen = Callable[[str, Manifest], None]
Login = Callable[[], Awaitable[Access]]


def registry_of(seen: Seen, login: Login) -> kopf.OperatorRegistry:
    """The handlers: who we are, and what happens to an ensemble. `seen` gets ADDED, MODIFIED, DELETED or LISTED."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        access = await login()
        return kopf.ConnectionInfo(
            server=access.server,
            ca_path=access.ca_file,
            insecure=not access.verify,
            certificate_path=access.certificate_file,
            private_key_path=access.key_file,
            token=access.token,
            proxy_url=access.proxy,
        )

    @kopf.on.event(ENSEMBLE.group, ENSEMBLE.version, ENSEMBLE.plural, registry=registry)
    async def ensemble_seen(event: kopf.RawEvent, **_: Any) -> None:
        seen(event["type"] or "LISTED", dict(event["object"]))

    return registry


def settings_of() -> kopf.OperatorSettings:
    """Make kopf a watcher only, which comes back by itself."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.networking.error_backoffs = ERROR_BACKOFFS_S
    settings.networking.request_timeout = 30.0
    settings.networking.connect_timeout = 5.0
    settings.watching.connect_timeout = 5.0
    settings.watching.server_timeout = 600
    settings.watching.inactivity_timeout = 100.0
    settings.queueing.idle_timeout = 1.0
    settings.process.ultimate_exiting_timeout = None
    return settings


class EnsembleWatch:
    """Runs kopf in its thread until stopped; starts it again when it ends. Made in the loop that gets the events.

    `prepare` is awaited in that loop before kopf starts again: it sees to what happened in the meantime, and returns
    when the resource can be watched, because kopf looks for it only when it starts.
    """

    def __init__(self, seen: Seen, login: Login, prepare: Callable[[], Awaitable[None]], namespace: str | None) -> None:
        self._home = asyncio.get_running_loop()
        self._seen, self._login, self._prepare = seen, login, prepare
        self._namespace = namespace
        self._stopping = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the thread ended without being asked to."""
        return self._thread.ident is not None and not self._thread.is_alive() and not self._stopping.is_set()

    def restart(self) -> None:
        """Its watch is dead: have a new one."""
        log.error("the watch of InferenceEnsembles is silent and starts again")
        self._stop()

    async def stop(self) -> None:
        """Stop kopf and wait for its end, for a while: a daemon thread ends with the process."""
        self._stopping.set()
        self._stop()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, END_S)

    def _run(self) -> None:
        again = False
        while not self._stopping.is_set():
            try:
                asyncio.run(self._operate(again=again))
            except Exception as error:
                # Whatever ended kopf, the answer is the same, and told: watch again.
                if not self._stopping.is_set():
                    log.error("the watch of InferenceEnsembles ended and starts again: %s", _explained(error))
            again = True
            self._stopping.wait(random.uniform(MIN_PAUSE_S, MAX_PAUSE_S))  # noqa: S311

    async def _operate(self, *, again: bool) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._stop = _stopper(loop, stop)
        if self._stopping.is_set():
            return
        if again:
            stopped, prepared = asyncio.create_task(stop.wait()), asyncio.create_task(self._at_home(self._prepare))
            await asyncio.wait((stopped, prepared), return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                prepared.cancel()
                return
            stopped.cancel()
            await prepared
        await kopf.operator(
            registry=registry_of(self._pass_on, lambda: self._at_home(self._login)),
            settings=settings_of(),
            identity=FIELD_MANAGER,  # type: ignore[arg-type]  # else it asks for the user's name, which a pod may not have
            clusterwide=self._namespace is None,
            namespaces=[self._namespace] if self._namespace else [],
            stop_flag=stop,
        )
        # Its connections over TLS end a moment after they are closed.
        await asyncio.sleep(CLOSE_S)

    def _pass_on(self, change: str, found: Manifest) -> None:
        self._home.call_soon_threadsafe(self._seen, change, found)

    async def _at_home(self, what: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Await something in the loop that it belongs to."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_awaited(what), self._home))


async def _awaited(what: Callable[[], Awaitable[ResultT]]) -> ResultT:
    return await what()


def _stopper(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Callable[[], None]:
    def ask() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)

    return ask


def _explained(error: BaseException) -> str:
    """What kopf raised, in the operator's words: a refusal names the rule that the role lacks."""
    message = str(error.args[0]) if error.args else type(error).__name__
    refused = re.search(rf'cannot (\w+) resource "{ENSEMBLE.plural}"', message)
    if refused is None:
        return f"{type(error).__name__}: {message}"
    inside = re.search(r'in the namespace "([^"]+)"', message)
    return str(Forbidden(refused[1], ENSEMBLE.group, ENSEMBLE.plural, inside[1] if inside else None, message))
