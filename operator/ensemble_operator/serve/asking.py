"""`ensemble apply`'s side of the runner's socket."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from ensemble_operator.errors import EnsembleError
from ensemble_operator.exits import ExitCode
from ensemble_operator.serve.change import Change, Told
from ensemble_operator.serve.preparation import Teller

CONNECT_S = 5.0


class NotServed(EnsembleError):
    """No server answers at the socket; the message says where it was looked for and what to do."""


class NotApplied(EnsembleError):
    """The server did not make the change; the message is the server's, and so is the exit code."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Wish:
    """A resource to serve: its name, its text, what the user calls it by, and where its relative paths start."""

    name: str
    text: str
    source: str
    folder: Path


async def ask_to_apply(socket: Path, wish: Wish, teller: Teller) -> Change:
    """Have the server at this socket serve a resource, telling how it goes on.

    Raises NotServed or NotApplied.
    """
    query = {"source": wish.source, "folder": str(wish.folder)}
    connector = aiohttp.UnixConnector(str(socket))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    try:
        async with (
            aiohttp.ClientSession("http://localhost", connector=connector, timeout=timeout) as session,
            session.put("/v1/ensemble", params=query, data=wish.text.encode()) as answer,
        ):
            if answer.status != 200:
                raise NotServed(f"{socket}: answered {answer.status}: is it `ensemble serve`?")
            async for line in answer.content:
                told = msgspec.json.decode(line, type=Told)
                if told.note is not None:
                    teller.note(told.note)
                if told.warning is not None:
                    teller.warn(told.warning)
                if told.error is not None:
                    raise NotApplied(told.error, ExitCode(told.exit_code))
                if told.change is not None:
                    return told.change
    except (aiohttp.ClientConnectorError, FileNotFoundError) as error:
        raise NotServed(
            f"{wish.name!r} is not served on this machine: nobody answers at {socket}: start it with "
            f"`ensemble serve {wish.source}`, or name its socket with --socket"
        ) from error
    except (aiohttp.ClientError, msgspec.DecodeError) as error:
        raise NotServed(f"{socket}: the server ended before the change was done: {error}") from error
    raise NotServed(f"{socket}: the server ended before the change was done")
