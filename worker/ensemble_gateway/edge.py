"""The public port: inferences at protocol level, every other request handed to aiohttp on the same connection.

A `POST …/infer` whose head and JSON header were seen before costs two dictionary look-ups, one copy of its rows and one
write. Requests of one connection are answered one after the other, in order (RFC 9112, section 9.3.2); what arrives
meanwhile waits. What is not read here (bodies in chunks, compressed ones, `Expect`, other routes, anything odd) goes,
bytes and all, to an aiohttp `web.Server` protocol, and the next inference is read here again.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from ensemble_gateway.admission import BodyBudget
from ensemble_gateway.heads import Head, Heads
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.queues import Request
from ensemble_gateway.replies import Replies, error_reply, full_reply
from ensemble_gateway.request import Answer, Array, InferHeader, RequestError
from ensemble_gateway.v2 import parse_header

MAX_HEAD_BYTES = 64 << 10
# Bytes of a next request that may arrive while one is answered; then reading pauses.
MAX_AHEAD_BYTES = 256 << 10
# A connection that does not finish a request that it has begun is closed after so long without a byte.
STALL_S = 60.0
IDLE_S = 300.0
CACHED_JSON_BYTES = 4096
ALL_CACHED_JSON_BYTES = 2 << 20

_LOG = logging.getLogger(__name__)


class Reading(enum.Enum):
    """Where a connection is."""

    HEAD = enum.auto()  # a request's head is awaited
    BODY = enum.auto()  # an inference's body is awaited
    ANSWERING = enum.auto()  # a request is being answered; what comes is kept for later
    LENDING = enum.auto()  # aiohttp is given the body of its request
    LENT = enum.auto()  # aiohttp has the connection for good


class Edge:
    """What all connections of the port share: the pipeline, caches of what was parsed before, aiohttp's protocol."""

    def __init__(self, pipeline: Callable[[], Pipeline], max_body_bytes: int) -> None:
        self.pipeline = pipeline
        self.heads = Heads(max_body_bytes)
        self.replies = Replies()
        self.budget: BodyBudget[Connection] = BodyBudget()
        self.connections: dict[asyncio.BaseTransport, Connection] = {}
        self.draining = False
        self.lend: Callable[[], asyncio.Protocol] | None = None
        self._headers: dict[tuple[bytes, bytes, int], InferHeader] = {}
        self._headers_of: Pipeline | None = None
        self._headers_bytes = 0

    def new_connection(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self)

    def serve_others(self, server: web.Server) -> None:
        """Hand every request that is not a plain inference to this server; its application has `announce`."""
        self.lend = server

    @web.middleware
    async def announce(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Outermost middleware of the application: tells the connection that its request is answered to the last byte."""
        response = await handler(request)
        await response.prepare(request)
        await response.write_eof()
        connection = self.connections.get(request.transport) if request.transport is not None else None
        if connection is not None:
            connection.lent_request_done(request.content.at_eof() or not request.body_exists)
        return response

    def header_of(self, pipeline: Pipeline, head: Head, text: bytes, binary_bytes: int) -> InferHeader:
        """The parsed JSON part of an inference, from the cache where the same bytes were parsed before.

        Raises RequestError.
        """
        if pipeline is not self._headers_of:
            self._headers, self._headers_of, self._headers_bytes = {}, pipeline, 0
            self.replies.clear()
        key = (head.target, text, binary_bytes)
        header = self._headers.get(key)
        if header is None:
            model = head.model_of(pipeline.models)
            header = parse_header(model, text, binary_bytes, max_rows=pipeline.max_rows(model))
            if len(text) <= CACHED_JSON_BYTES and all(part.array is None for part in header.inputs):
                self._headers_bytes += len(text)
                if self._headers_bytes > ALL_CACHED_JSON_BYTES:
                    self._headers, self._headers_bytes = {}, len(text)
                self._headers[key] = header
        return header

    def drain(self) -> None:
        """Close every connection as soon as it has answered what it was asked."""
        self.draining = True
        for connection in list(self.connections.values()):
            connection.close_if_idle()

    def sweep(self, now: float) -> None:
        """Close connections that have stalled in the middle of a request, or idle for long."""
        for connection in list(self.connections.values()):
            connection.close_if_stalled(now)


class Connection(asyncio.Protocol):
    """One client connection; also the sink of its request in flight."""

    __slots__ = (
        "_buffer", "_edge", "_head", "_heard_at", "_lent", "_lent_left", "_paused", "_pipeline", "_reading",
        "_request", "_transport", "header",
    )  # fmt: skip

    header: InferHeader

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._transport: asyncio.Transport | None = None
        self._reading = Reading.HEAD
        self._buffer: bytes | bytearray = b""
        self._head: Head | None = None
        self._request: Request | None = None
        self._pipeline: Pipeline | None = None
        self._lent: asyncio.Protocol | None = None
        self._lent_left = 0
        self._paused = False
        self._heard_at = 0.0

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = transport  # type: ignore[assignment]
        self._heard_at = asyncio.get_running_loop().time()
        self._edge.connections[transport] = self

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or we have closed: rows in flight are dropped."""
        if self._transport is not None:
            self._edge.connections.pop(self._transport, None)
        if self._request is not None and self._pipeline is not None:
            self._pipeline.cancel(self._request)
        self._edge.budget.release(self)
        if self._lent is not None:
            self._lent.connection_lost(exc)
        self._transport = self._lent = self._request = None

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._reading is Reading.LENT:
            self._lend(data)
            return
        if not self._buffer:
            self._buffer = data
        else:
            if isinstance(self._buffer, bytes):
                self._buffer = bytearray(self._buffer)
            self._buffer += data
        if self._reading is Reading.ANSWERING:
            if len(self._buffer) > MAX_AHEAD_BYTES:
                self._pause()
        else:
            self._read()

    def eof_received(self) -> bool:
        """The client has closed its side: it is taken to have left."""
        return False

    def pause_writing(self) -> None:
        """The client reads slowly. Requests are answered one by one: only aiohttp has something to stop."""
        if self._lent is not None:
            self._lent.pause_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._lent is not None:
            self._lent.resume_writing()

    # -- reading --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read what has come, up to the end of a request that is not answered yet."""
        while self._buffer and self._transport is not None:
            match self._reading:
                case Reading.HEAD if not self._read_head():
                    break
                case Reading.BODY if not self._read_body():
                    break
                case Reading.LENDING:
                    self._lend_body()
                case Reading.ANSWERING:
                    return
                case Reading.LENT:
                    data, self._buffer = bytes(self._buffer), b""
                    self._lend(data)
        self._heard_at = asyncio.get_running_loop().time()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self._buffer) > MAX_HEAD_BYTES:
                self._reading = Reading.LENT
            return len(self._buffer) > MAX_HEAD_BYTES
        head = self._edge.heads.parse(bytes(self._buffer[:end]))
        if head.fast:
            self._head, self._reading = head, Reading.BODY
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
                self._pause()
            return False
        request = memoryview(self._buffer)[: head.size]
        self._buffer = bytes(self._buffer[head.size :]) if len(self._buffer) > head.size else b""
        self._reading = Reading.ANSWERING
        self._infer(head, request[head.length :])
        return True

    def resume_body(self) -> None:
        """The large body that this connection waits to read may come now."""
        self._heard_at = asyncio.get_running_loop().time()
        self._resume()

    # -- inference ------------------------------------------------------------------------------------------------

    def _infer(self, head: Head, body: memoryview) -> None:
        edge = self._edge
        try:
            pipeline = self._pipeline = edge.pipeline()
            text, binary = head.split(body)
            self.header = edge.header_of(pipeline, head, text, len(binary))
            self._request = pipeline.submit(self, binary)
        except RequestError as error:
            self.refused(error)
        except Exception:
            _LOG.exception("an inference could not be taken")
            self.refused(RequestError(500, "internal error: the gateway's log has the cause"))
        edge.budget.release(self)

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
        transport.write(reply)
        if self._keep_alive():
            self._next()
        else:
            transport.close()

    def _next(self) -> None:
        """The request is answered: read on."""
        self._request = None
        self._head = None
        self._reading = Reading.HEAD
        if self._paused:
            self._resume()
        if self._buffer:
            asyncio.get_running_loop().call_soon(self._read)

    # -- lending to aiohttp ---------------------------------------------------------------------------------------

    def _lend_body(self) -> None:
        data, self._buffer = bytes(self._buffer[: self._lent_left]), bytes(self._buffer[self._lent_left :])
        self._lent_left -= len(data)
        if not self._lent_left:
            self._reading = Reading.ANSWERING
        self._lend(data)

    def _lend(self, data: bytes) -> None:
        if self._lent is None and self._edge.lend is not None and self._transport is not None:
            self._lent = self._edge.lend()
            self._lent.connection_made(self._transport)
        if self._lent is not None:
            self._lent.data_received(data)

    def lent_request_done(self, body_read: bool) -> None:
        """aiohttp has answered. Where it has not read the whole body, it keeps the connection."""
        if self._reading is Reading.ANSWERING and body_read:
            if self._edge.draining and self._transport is not None:
                self._transport.close()
            else:
                self._next()
        else:
            self._reading = Reading.LENT

    # -- closing, pausing -----------------------------------------------------------------------------------------

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        if self._reading is Reading.HEAD and not self._buffer and self._transport is not None:
            self._transport.close()

    def close_if_stalled(self, now: float) -> None:
        """Close if the client neither sends what it began nor asks anything."""
        if self._reading not in (Reading.HEAD, Reading.BODY) or self._transport is None or self._paused:
            return
        if now - self._heard_at > (STALL_S if self._buffer else IDLE_S):
            self._transport.close()

    def _pause(self) -> None:
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
