"""One client connection of the public port: a small state machine over the bytes that come and the answers that go.

Requests of one connection are answered one after the other, in order (RFC 9112, section 9.3.2); what arrives meanwhile
waits, within bounds, and nothing more is read from a client that does not take its answers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ensemble_gateway.heads import Head, cannot_become_a_head
from ensemble_gateway.lent import MAX_HEAD_BYTES
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.queues import Request
from ensemble_gateway.reading import SEEN_BYTES, Reading, Seen
from ensemble_gateway.replies import error_reply, full_reply
from ensemble_gateway.request import Answer, Array, InferHeader, RequestError

if TYPE_CHECKING:
    from ensemble_gateway.edge import Edge

# Bytes of a next request that may arrive while one is answered; then reading pauses.
MAX_AHEAD_BYTES = 256 << 10

_LOG = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """One client connection; also the sink of its request in flight."""

    __slots__ = (
        "_blocked", "_buffer", "_due", "_edge", "_head", "_lent", "_lent_busy", "_lent_left", "_paused", "_pipeline",
        "_reading", "_request", "_seen", "_sent_at", "_time", "_transport", "_unsent", "header",
    )  # fmt: skip

    header: InferHeader

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._time = asyncio.get_running_loop().time
        self._transport: asyncio.Transport | None = None
        self._reading = Reading.HEAD
        self._buffer: bytes | bytearray = b""
        self._head: Head | None = None
        self._request: Request | None = None
        self._pipeline: Pipeline | None = None
        self._seen: Seen | None = None
        self._lent: asyncio.Protocol | None = None
        self._lent_left = 0
        self._lent_busy = self._paused = self._blocked = False
        self._unsent, self._sent_at = 0, 0.0
        # When the client must have done its next thing.
        self._due = self._time() + edge.limits.idle_s

    @property
    def waiting_bytes(self) -> int:
        """Bytes that have come and are not part of an answered request."""
        return len(self._buffer)

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = transport  # type: ignore[assignment]
        self._edge.connections[transport] = self

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or we have closed: rows in flight are dropped."""
        if self._transport is not None:
            self._edge.forget(self._transport)
        if self._request is not None and self._pipeline is not None:
            self._pipeline.cancel(self._request)
        self._edge.budget.release(self)
        if self._lent is not None:
            self._lent.connection_lost(exc)
        self._transport = self._lent = self._request = None
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        seen = self._seen
        awaited = self._reading is Reading.HEAD and not (self._buffer or self._blocked)
        if awaited and seen is not None and len(data) == seen.head.size and data.startswith(seen.text):
            self._head, self._reading = seen.head, Reading.ANSWERING
            self._submit(seen, memoryview(data)[len(seen.text) :])
            return
        if self._reading is Reading.LENT:
            if not self._lent_busy:
                self._due = self._time() + self._edge.limits.idle_s
            self._lend(data)
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
        if self._lent is not None:
            self._lent.pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._blocked = False
        if self._lent is not None:
            self._lent.resume_writing()
        if self._reading in (Reading.HEAD, Reading.BODY, Reading.LENDING):
            self._read_on()

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read what has come, up to the end of a request that is not answered yet."""
        while self._buffer and self._transport is not None and not self._blocked:
            match self._reading:
                case Reading.HEAD if not self._read_head():
                    return
                case Reading.BODY if not self._read_body():
                    return
                case Reading.LENDING:
                    self._lend_body()
                case Reading.LENT:
                    self._lend_all()
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
            self._lent_left, self._reading = head.size, Reading.LENDING
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

    # -- inference ------------------------------------------------------------------------------------------------

    def _infer(self, head: Head, request: memoryview) -> None:
        edge = self._edge
        try:
            pipeline = edge.pipeline()
            text, binary = head.split(request[head.length :])
            header = edge.header_of(pipeline, head, text, len(binary))
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()
        else:
            seen = Seen(bytes(request[: head.length + len(text)]), head, header, pipeline)
            self._submit(seen, binary)
            if any(part.array is not None for part in header.inputs):
                # The rows are in the store now: twice would be once too often.
                self.header = replace(header, inputs=())
            elif len(seen.text) <= SEEN_BYTES:
                self._seen = seen
        edge.budget.release(self)

    def _submit(self, seen: Seen, binary: memoryview) -> None:
        pipeline = self._edge.pipeline()
        if pipeline is not seen.pipeline:
            # A new plan: what was parsed is of the former.
            self._seen = None
            self._buffer, self._reading = seen.text + bytes(binary), Reading.HEAD
            self._read()
            return
        self.header, self._pipeline = seen.header, pipeline
        try:
            self._request = pipeline.submit(self, binary)
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()

    def _refuse_unexpected(self) -> None:
        _LOG.exception("an inference could not be taken")
        self.refused(RequestError(500, "internal error: the gateway's log has the cause"))

    def answered(self, outputs: Sequence[Array]) -> None:
        """Write the usual answer: a prefix known from the header, and the outputs' bytes."""
        prefix = self._edge.replies.prefix(self.header, self._keep_alive())
        if prefix is None:
            specs = self.header.model.outputs
            self.answered_in_full(Answer({s.name: o for s, o in zip(specs, outputs, strict=True)}))
        else:
            self._write(prefix.join_with(outputs))

    def answered_in_full(self, answer: Answer) -> None:
        """Write any other answer."""
        try:
            self._write(full_reply(self.header, answer, self._keep_alive()))
        except RequestError as error:
            self.refused(error)

    def refused(self, error: RequestError) -> None:
        """Write an error."""
        self._write(error_reply(error, self._keep_alive()))

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

    def _lend_body(self) -> None:
        data, self._buffer = bytes(self._buffer[: self._lent_left]), bytes(self._buffer[self._lent_left :])
        self._lent_left -= len(data)
        self._reading = Reading.LENDING if self._lent_left else Reading.ANSWERING
        self._lend(data)

    def _lend_all(self) -> None:
        data, self._buffer = bytes(self._buffer), b""
        self._lend(data)

    def _lend(self, data: bytes) -> None:
        if self._lent is None and self._edge.lend is not None and self._transport is not None:
            self._lent = self._edge.lend()
            self._lent.connection_made(self._transport)
        if self._lent is not None and data:
            self._lent.data_received(data)

    def lent_request_began(self) -> None:
        """A request is with a handler of aiohttp, which has its own patience with the client until it has."""
        self._lent_busy, self._due = True, math.inf

    def lent_request_done(self, keep_alive: bool) -> None:
        """The request is answered by aiohttp. What it closes, or has not got the whole body of, it keeps."""
        self._lent_busy = False
        if self._reading is Reading.ANSWERING and keep_alive:
            self._next()
        else:
            self._reading = Reading.LENT
            self._due = self._time() + self._edge.limits.idle_s
            self._resume()
            self._lend_all()

    def refuse_and_close(self, error: RequestError) -> None:
        """Answer what aiohttp has parsed and cannot answer, as the last thing on this connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(error_reply(error, keep_alive=False))
            self._transport.close()

    # -- closing, pausing -----------------------------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        awaiting = self._reading is Reading.HEAD or (self._reading is Reading.LENT and not self._lent_busy)
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
        elif self._request is None and not self._lent_busy:
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
