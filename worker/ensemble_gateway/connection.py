"""One client connection of the public port: a small state machine over the bytes that come and the answers that go.

Requests of one connection are answered one after the other, in order (RFC 9112, section 9.3.2); what arrives meanwhile
waits, within bounds, and nothing more is read from a client that does not take its answers.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from ensemble_gateway.bodies import Unclear
from ensemble_gateway.heads import cannot_become_a_head
from ensemble_gateway.inference import Inference
from ensemble_gateway.lent import MAX_HEAD_BYTES
from ensemble_gateway.loan import Loan
from ensemble_gateway.reading import Reading
from ensemble_gateway.replies import error_reply
from ensemble_gateway.request import RequestError

if TYPE_CHECKING:
    from ensemble_gateway.edge import Edge

# Bytes of a next request that may arrive while one is answered; then reading pauses.
MAX_AHEAD_BYTES = 256 << 10


class Connection(Inference, asyncio.Protocol):
    """One client connection; also the sink of its request in flight."""

    __slots__ = ("_blocked", "_buffer", "_loan", "_paused", "_reading", "_sent_at", "_time", "_transport", "_unsent")

    def __init__(self, edge: Edge) -> None:
        super().__init__(edge)
        self._time = asyncio.get_running_loop().time
        self._transport: asyncio.Transport | None = None
        self._reading = Reading.HEAD
        self._buffer: bytes | bytearray = b""
        self._loan = Loan(edge.lend)
        self._paused = self._blocked = False
        self._unsent, self._sent_at = 0, 0.0
        self._due = self._time() + edge.limits.idle_s

    @property
    def waiting_bytes(self) -> int:
        """Bytes that have come and are not part of an answered request."""
        return len(self._buffer)

    @property
    def reading(self) -> Reading:
        """Where it is with its client's bytes."""
        return self._reading

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = transport  # type: ignore[assignment]
        self._edge.connections[transport] = self

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or we have closed: rows in flight are dropped."""
        if self._transport is not None:
            self._edge.forget(self._transport)
        self._leave_inference()
        self._loan.end(exc)
        self._transport = None
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        seen = self._seen
        awaited = self._reading is Reading.HEAD and not (self._buffer or self._blocked)
        if awaited and seen is not None and len(data) == seen.head.size and data.startswith(seen.text):
            if seen.pipeline is self._edge.pipeline():
                self._head, self._reading = seen.head, Reading.ANSWERING
                self._submit(seen.pipeline, seen.header, memoryview(data)[len(seen.text) :])
                return
            # A new plan: what was parsed is of the former.
            self._seen = None
        if self._reading is Reading.LENT:
            if not self._loan.busy:
                self._due = self._time() + self._edge.limits.idle_s
            if self._transport is not None:
                self._loan.give(self._transport, data)
            return
        if self._reading is Reading.LEAVING:
            return
        if not self._buffer:
            self._buffer = data
            if self._reading is Reading.HEAD:
                self._due = self._time() + self._edge.limits.stall_s
        else:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        if self._reading is Reading.ANSWERING or self._blocked:
            if len(self._buffer) > MAX_AHEAD_BYTES:
                self._pause()
        else:
            self._read()

    def eof_received(self) -> bool:
        """The client has closed its side: it is taken to have left."""
        return False

    def pause_writing(self) -> None:
        """The client reads slowly: its next request waits."""
        self._blocked = True
        self._loan.pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._blocked = False
        self._loan.resume_writing()
        if self._reading in (Reading.HEAD, Reading.BODY, Reading.LENDING):
            self._read_on()

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read what has come, up to the end of a request that is not answered yet."""
        while self._buffer and (transport := self._transport) is not None and not self._blocked:
            match self._reading:
                case Reading.HEAD if not self._read_head():
                    return
                case Reading.BODY if not self._read_body():
                    return
                case Reading.LENDING:
                    self._lend_body(transport)
                case Reading.LENT:
                    self._lend_all(transport)
                case Reading.ANSWERING | Reading.LEAVING:
                    return

    def _read_on(self) -> None:
        """Read what has come meanwhile, in the loop's next turn: other connections have waited too."""
        if self._blocked:
            return
        self._resume()
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._read)

    def _read_head(self) -> bool:
        if self._buffer[0] in b"\r\n":
            # Empty lines before a request (RFC 9112, section 2.2).
            self._buffer = self._buffer.lstrip(b"\r\n")
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 or end > MAX_HEAD_BYTES:
            refusal = cannot_become_a_head(self._buffer)
            if refusal is not None:
                self._leave(refusal)
            return False
        head = self._edge.heads.parse(bytes(self._buffer[:end]))
        if head.fast:
            self._head, self._reading = head, Reading.BODY
            self._due = self._time() + self._edge.limits.body_s(head.size)
        elif head.refusal is not None:
            self._leave(RequestError(*head.refusal))
        elif head.endless:
            self._reading = Reading.LENT
        else:
            self._loan.begin(head)
            self._reading = Reading.LENDING
        return True

    def _read_body(self) -> bool:
        head = self._head
        if head is None:
            raise AssertionError("a body without a head")
        if len(self._buffer) < head.size:
            if not self._edge.budget.admit(self, head.size):
                self._due = math.inf
                self._pause()
            return False
        request = memoryview(self._buffer)[: head.size]
        self._buffer = bytes(self._buffer[head.size :]) if len(self._buffer) > head.size else b""
        self._reading = Reading.ANSWERING
        self._infer(head, request)
        return True

    def resume_body(self) -> None:
        """The large body that this connection waits to read may come now."""
        size = self._head.size if self._head is not None else 0
        self._due = self._time() + self._edge.limits.body_s(size)
        self._resume()

    def _keep_alive(self) -> bool:
        return not self._edge.draining and (self._head is None or self._head.keep_alive)

    def _write(self, reply: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        keep_alive = self._keep_alive()
        transport.write(reply)
        self._request = None
        if keep_alive:
            self._next()
        else:
            self._reading, self._due = Reading.LEAVING, math.inf
            transport.close()

    def _next(self) -> None:
        """The request is answered: read on."""
        limits = self._edge.limits
        self._head, self._reading = None, Reading.HEAD
        self._due = self._time() + (limits.stall_s if self._buffer else limits.idle_s)
        self._read_on()

    # -- lending to aiohttp ---------------------------------------------------------------------------------------

    def _lend_body(self, transport: asyncio.Transport) -> None:
        came, self._buffer = self._buffer, b""
        try:
            given, done = self._loan.give_request(transport, came)
        except Unclear:
            self._reading, self._buffer = Reading.LENT, came
            self._lend_all(transport)
            return
        # What is the client's next may be answered only after this.
        self._buffer = bytes(came[given:])
        if done and self._reading is Reading.LENDING:
            self._reading = Reading.ANSWERING

    def _lend_all(self, transport: asyncio.Transport) -> None:
        came, self._buffer = bytes(self._buffer), b""
        self._loan.give(transport, came)

    def lent_request_began(self) -> None:
        """A request is with a handler of aiohttp, which has its own patience with the client until it has."""
        self._loan.busy, self._due = True, math.inf

    def lent_request_done(self, keep_alive: bool) -> None:
        """The request is answered by aiohttp. What it closes, or has not got the whole body of, it keeps."""
        self._loan.busy = False
        if self._reading is Reading.ANSWERING and keep_alive:
            self._next()
        else:
            self._reading = Reading.LENT
            self._due = self._time() + self._edge.limits.idle_s
            self._resume()
            if self._transport is not None:
                self._lend_all(self._transport)

    def refuse_and_close(self, error: RequestError) -> None:
        """Answer what aiohttp has parsed and cannot answer, as the last thing on this connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(error_reply(error, keep_alive=False))
            self._transport.close()

    # -- closing, pausing -----------------------------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        awaiting = self._reading is Reading.HEAD or (self._reading is Reading.LENT and not self._loan.busy)
        if awaiting and not self._buffer and self._transport is not None:
            self._transport.close()

    def close_if_stalled(self, now: float) -> None:
        """Close if the client neither sends what it began, nor takes what it is sent, nor asks anything."""
        transport = self._transport
        if transport is None:
            return
        unsent = transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._sent_at = now
        self._unsent = unsent
        if unsent and now - self._sent_at > self._edge.limits.stall_s:
            transport.abort()
        elif now < self._due:
            return
        elif self._reading is Reading.LEAVING:
            transport.abort()
        elif (self._reading is Reading.HEAD and self._buffer) or self._reading is Reading.BODY:
            self._leave(RequestError(408, "the request did not arrive in time: send it faster"))
        elif self._request is None and not self._loan.busy:
            transport.close()

    def _leave(self, error: RequestError) -> None:
        """Answer an error after which the client's bytes make no sense; they are dropped until it has read it.

        Closing at once would reset the connection, and the client might lose the answer (RFC 9112, section 9.6).
        """
        self._edge.budget.release(self)
        self._buffer, self._head, self._reading = b"", None, Reading.LEAVING
        self._due = self._time() + self._edge.limits.linger_s
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(error_reply(error, keep_alive=False))
            transport.write_eof()
            self._resume()

    def _pause(self) -> None:
        # Told each time: aiohttp, which shares the transport, may have resumed it.
        if self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
