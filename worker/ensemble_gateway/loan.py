"""A connection on loan to aiohttp: what the edge does not read itself is given to a protocol of its server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from ensemble_gateway.bodies import Body, ChunkedBody, KnownBody, Unclear

if TYPE_CHECKING:
    from ensemble_gateway.heads import Head


class Loan:
    """The protocol of one connection, made when it is first needed. `busy`: a handler has a request."""

    __slots__ = ("_body", "_lend", "_protocol", "busy")

    def __init__(self, lend: Callable[[], asyncio.Protocol] | None) -> None:
        self.busy = False
        self._lend = lend
        self._protocol: asyncio.Protocol | None = None
        self._body: Body | None = None

    def begin(self, head: Head) -> None:
        """A request will be given, as far as its body goes."""
        self._body = ChunkedBody(head.length) if head.chunked else KnownBody(head.size)

    def give_request(self, transport: asyncio.Transport, came: bytes | bytearray) -> tuple[int, bool]:
        """Give what belongs to the request that has begun: how many bytes that are, and whether they are the last.

        Raises Unclear, and gives nothing, if nobody can say where it ends.
        """
        if self._body is None:
            raise Unclear
        mine = self._body.take(came)
        done = self._body.done
        self.give(transport, bytes(came[:mine]))
        return mine, done

    def give(self, transport: asyncio.Transport, came: bytes) -> None:
        """Give bytes of whatever they are."""
        if self._protocol is None and self._lend is not None:
            self._protocol = self._lend()
            self._protocol.connection_made(transport)
        if self._protocol is not None and came:
            self._protocol.data_received(came)

    def pause_writing(self) -> None:
        """The client reads slowly."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def end(self, error: Exception | None) -> None:
        """The connection has ended."""
        if self._protocol is not None:
            self._protocol.connection_lost(error)
            self._protocol = None
