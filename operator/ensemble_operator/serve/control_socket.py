"""The runner's own small API on a Unix socket: see what is served, and change it (`ensemble apply`).

`GET /v1/ensemble` is the status in the form of the resource's. `PUT /v1/ensemble?source=NAME&folder=PATH` takes a
resource, YAML or JSON, and answers with a line of JSON (`Told`) for everything to know, the last with the change or the
error. Who hangs up during preparation ends it; a change that has begun goes on to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from aiohttp import web

from ensemble_operator import resource_file
from ensemble_operator.addresses import AddressUnavailable
from ensemble_operator.exit_codes import EXPECTED, exit_code_of
from ensemble_operator.serve.applying import Applier
from ensemble_operator.serve.change import Change, Told, status_of
from ensemble_operator.serve.deployment import Deployment
from ensemble_operator.serve.preparation import Teller

FOLDER = "ensemble-operator"
# The kernel's limit for a Unix socket's path.
MAX_PATH_BYTES = 107


def socket_path(name: str, runtime_base: str | None) -> Path:
    """Where the server of an ensemble listens: in `runtime_base` ($XDG_RUNTIME_DIR), else in a folder of this user."""
    file = f"{name}.sock"
    if runtime_base and os.access(runtime_base, os.W_OK | os.X_OK):
        wanted = Path(runtime_base) / FOLDER / file
        if len(os.fsencode(wanted)) <= MAX_PATH_BYTES:
            return wanted
    return Path(tempfile.gettempdir()) / f"{FOLDER}-{os.getuid()}" / file


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket at this path that only this user may connect to; gone at the end, with its usual folder if empty.

    One that nobody listens on any more is replaced. Raises AddressUnavailable if somebody does, or there can be none.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            _own_folder(path.parent)
            if _answers(path):
                raise AddressUnavailable(f"{path}: another server listens there: choose another --socket")
            path.unlink(missing_ok=True)
            former = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(former)
            listener.listen(16)
        except OSError as error:
            raise AddressUnavailable(f"{path}: no socket can be there: {error.strerror or error}") from error
        ours = path.stat().st_ino
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if path.stat().st_ino == ours:
                    path.unlink()
                if path.parent.name.startswith(FOLDER):
                    path.parent.rmdir()


def _own_folder(folder: Path) -> None:
    """Make the folder, private, unless it is there; one of another user is not to be trusted. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.lstat()
    shared = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if folder.name.startswith(FOLDER) and (state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode) or shared):
        raise OSError(f"the folder {folder} is not this user's alone")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True
        return True


class _Stream:
    """What is told while a resource is applied: to the runner's own screen, and to whoever asked, while they listen."""

    def __init__(self, screen: Teller) -> None:
        self._screen = screen
        self.lines: asyncio.Queue[Told] = asyncio.Queue()

    def note(self, text: str) -> None:
        self._screen.note(text)
        self.lines.put_nowait(Told(note=text))

    def warn(self, text: str) -> None:
        self._screen.warn(text)
        self.lines.put_nowait(Told(warning=text))


class ControlApi:
    """The API. `changes` gets every change that was made."""

    def __init__(self, deployment: Deployment, applier: Applier, screen: Teller) -> None:
        self._deployment, self._applier, self._screen = deployment, applier, screen
        self._work: set[asyncio.Task[None]] = set()
        self.changes: asyncio.Queue[Change] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def served(self, listener: socket.socket) -> AsyncIterator[None]:
        """Answer on this socket; what is under way is ended at the end."""
        app = web.Application(client_max_size=resource_file.MAX_RESOURCE_BYTES)
        app.add_routes([web.get("/v1/ensemble", self._get), web.put("/v1/ensemble", self._put)])
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            yield
        finally:
            for task in self._work:
                task.cancel()
            await asyncio.gather(*self._work, return_exceptions=True)
            await runner.cleanup()

    async def _get(self, _request: web.Request) -> web.Response:
        observed = await self._deployment.observe()
        applier = self._applier
        status = status_of(applier.planned, self._deployment.plan, observed, changing=applier.walking)
        return web.Response(body=msgspec.json.encode(status), content_type="application/json")

    async def _put(self, request: web.Request) -> web.StreamResponse:
        text = (await request.read()).decode(errors="replace")
        source, folder = request.query.get("source", "resource"), Path(request.query.get("folder", "/"))
        stream = _Stream(self._screen)
        task = asyncio.create_task(self._apply(text, source, folder, stream))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        try:
            await response.prepare(request)
            while True:
                told = await stream.lines.get()
                await response.write(msgspec.json.encode(told) + b"\n")
                if told.change is not None or told.error is not None:
                    return response
        finally:
            if not self._applier.walking:
                task.cancel()

    async def _apply(self, text: str, source: str, folder: Path, stream: _Stream) -> None:
        """Apply, and tell what came of it."""
        try:
            change = await self._applier.apply(text, source, folder, stream)
        except EXPECTED as error:
            self._screen.warn(f"not changed: {error}")
            stream.lines.put_nowait(Told(error=str(error), exit_code=exit_code_of(error)))
        except Exception as error:
            stream.lines.put_nowait(Told(error=f"{type(error).__name__}: {error}", exit_code=exit_code_of(error)))
            raise
        else:
            self.changes.put_nowait(change)
            stream.lines.put_nowait(Told(change=change))
