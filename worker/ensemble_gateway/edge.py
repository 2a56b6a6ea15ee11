"""The public port: inferences at protocol level, every other request handed to aiohttp on the same connection.

A `POST …/infer` whose head and JSON header were seen before costs two dictionary look-ups, one copy of its rows and one
write. What is not read here (bodies in chunks, compressed ones, `Expect`, other routes) goes, bytes and all, to an
aiohttp `web.Server` protocol. What all connections share is here; `connection` has what each does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion10, HttpVersion11, web

from ensemble_gateway.admission import SMALL_BYTES, BodyBudget, Limits, Receiver
from ensemble_gateway.connection import Connection
from ensemble_gateway.heads import Head, Heads
from ensemble_gateway.lent import lent_protocols
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.replies import Replies
from ensemble_gateway.request import InferHeader, RequestError
from ensemble_gateway.routes import error_response
from ensemble_gateway.v2 import parse_header

CACHED_JSON_BYTES = 4096
ALL_CACHED_JSON_BYTES = 2 << 20
# What a cached header takes beside its text, about.
HEADER_BYTES = 512
# What a body in chunks is taken to have while it comes: nobody knows.
CHUNKED_BYTES = 1 << 20


class Edge:
    """What all connections of the port share: the pipeline, caches of what was parsed before, aiohttp's protocol."""

    def __init__(
        self, pipeline: Callable[[], Pipeline], max_body_bytes: Callable[[], int], limits: Limits | None = None
    ) -> None:
        self.pipeline = pipeline
        self.limits = limits or Limits()
        self.heads = Heads(max_body_bytes())
        self._max_body_bytes = max_body_bytes
        self.replies = Replies()
        self.budget: BodyBudget[Receiver] = BodyBudget()
        self.connections: dict[asyncio.BaseTransport, Connection] = {}
        self.draining = False
        self._empty: asyncio.Event | None = None
        self.lend: Callable[[], asyncio.Protocol] | None = None
        self._headers: dict[tuple[bytes, bytes, int], InferHeader] = {}
        self._headers_of: Pipeline | None = None
        self._headers_bytes = 0

    def new_connection(self) -> Connection:
        """The protocol of a new connection."""
        return Connection(self)

    def forget(self, transport: asyncio.BaseTransport) -> None:
        """A connection has ended."""
        self.connections.pop(transport, None)
        if self._empty is not None and not self.connections:
            self._empty.set()

    def serve_others(self, server: web.Server) -> None:
        """Hand every request that is not a plain inference to this server; its application has `announce`."""
        self.lend = lent_protocols(server)

    @web.middleware
    async def announce(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Outermost middleware of the application: tells the connection how far aiohttp is with its request.

        Large bodies wait their turn here.
        """
        connection = self.connections.get(request.transport) if request.transport is not None else None
        if connection is None:
            return await handler(request)
        if request.version not in (HttpVersion10, HttpVersion11):
            version = f"{request.version.major}.{request.version.minor}"
            error = RequestError(505, f"HTTP/{version} is not served: use HTTP/1.1")
            # aiohttp would answer in the client's version: it is told a closed connection instead.
            connection.refuse_and_close(error)
            return error_response(error)
        connection.lent_request_began()
        turn = _Turn()
        size = CHUNKED_BYTES if request.content_length is None else request.content_length
        try:
            if request.body_exists and size > SMALL_BYTES and not self.budget.admit(turn, size):
                await turn.come.wait()
            response = await handler(request)
        finally:
            self.budget.release(turn)
        if self.draining or "Upgrade" in request.headers:
            # What follows an Upgrade is no HTTP for aiohttp, although it has answered in HTTP.
            response.force_close()
        await response.prepare(request)
        await response.write_eof()
        connection.lent_request_done(bool(response.keep_alive))
        return response

    def header_of(self, pipeline: Pipeline, head: Head, text: bytes, binary_bytes: int) -> InferHeader:
        """The parsed JSON part of an inference, from the cache where the same bytes were parsed before.

        Raises RequestError.
        """
        if pipeline is not self._headers_of:
            # What was parsed for the plan before. Heads know only the limit.
            self._headers, self._headers_of, self._headers_bytes = {}, pipeline, 0
            self.heads = Heads(self._max_body_bytes())
            self.replies.clear()
        if len(text) > CACHED_JSON_BYTES:
            return self._parse(pipeline, head, text, binary_bytes)
        key = (head.target, text, binary_bytes)
        header = self._headers.get(key)
        if header is None:
            header = self._parse(pipeline, head, text, binary_bytes)
            if all(part.array is None for part in header.inputs):
                size = HEADER_BYTES + len(head.target) + len(text)
                self._headers_bytes += size
                if self._headers_bytes > ALL_CACHED_JSON_BYTES:
                    self._headers, self._headers_bytes = {}, size
                self._headers[key] = header
        return header

    async def parse_off_loop(self, head: Head, text: bytes, binary: memoryview) -> tuple[InferHeader, Pipeline]:
        """The parsed JSON part of an inference, and the pipeline that it is for, which serves now; read in a thread.

        Raises RequestError.
        """
        while True:
            pipeline = self.pipeline()
            header = await asyncio.to_thread(self._parse, pipeline, head, text, len(binary))
            if pipeline is self.pipeline():
                return header, pipeline

    @staticmethod
    def _parse(pipeline: Pipeline, head: Head, text: bytes, binary_bytes: int) -> InferHeader:
        model = head.model_of(pipeline.models)
        return parse_header(model, text, binary_bytes, max_rows=pipeline.max_rows(model))

    async def drain(self, within_s: float) -> bool:
        """Close every connection as soon as it has answered what it was asked; False if some had to be broken."""
        self.draining = True
        for connection in list(self.connections.values()):
            connection.close_if_idle()
        if self.connections:
            self._empty = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), within_s)
        left = list(self.connections)
        for transport in left:
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        return not left

    def sweep(self, now: float) -> None:
        """Close connections that have stalled in the middle of a request, or idle for long."""
        for connection in list(self.connections.values()):
            connection.close_if_stalled(now)


class _Turn:
    """Waits for its turn to read a body."""

    def __init__(self) -> None:
        self.come = asyncio.Event()

    def resume_body(self) -> None:
        """The body may be read now."""
        self.come.set()
