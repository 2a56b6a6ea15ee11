"""A load's clients, and what is counted of them: connections at protocol level, closed and open loops.

Times are of `time.perf_counter`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Sequence

from ensemble_operator.load.answer_stream import Answer, AnswerStream, Known, NotHttp
from ensemble_operator.load.latencies import Latencies
from ensemble_operator.load.loads import Load, Result

CONNECT_S = 10.0
RECONNECT_S = 0.1


class Generator:
    """One load: what its connections share, and what is counted."""

    def __init__(self, load: Load, messages: Sequence[bytes]) -> None:
        self.load, self.messages = load, messages
        self.known = Known()
        self.stopping = False
        self.finished = asyncio.Event()
        self.idle: deque[Connection] = deque()
        self._waiting: deque[float] = deque()
        self._latencies, self._failures = Latencies(), Counter[str]()
        self._example = ""
        self._rows_in_window = self._partial = self._next = 0
        self._under_way = 0
        self.answered_rows = 0
        self._from_s = self._until_s = 0.0

    @property
    def failures(self) -> int:
        """Requests that failed in the window."""
        return self._failures.total()

    def begin(self, now: float) -> None:
        """Count what falls due after the warm-up."""
        self._from_s = now + self.load.warmup_s
        self._until_s = self._from_s + self.load.duration_s

    def message(self) -> bytes:
        """The next request."""
        self._next += 1
        self._under_way += 1
        return self.messages[self._next % len(self.messages)]

    def fell_due(self, due_s: float) -> None:
        """A request of an open loop: for the connection that has waited longest, else for the next that is free."""
        if self.idle:
            self.idle.popleft().send(due_s)
        else:
            self._waiting.append(due_s)

    def answered(self, answer: Answer, due_s: float, now: float) -> None:
        """An answer came."""
        self._settle()
        if answer.status != 200:
            self._fail(f"HTTP {answer.status}", answer.error, due_s)
            return
        self.answered_rows += self.load.rows
        if self._from_s <= now < self._until_s:
            self._rows_in_window += self.load.rows
        if self._counts(due_s):
            self._latencies.add(now - due_s)
            self._partial += answer.missing

    def failed(self, reason: str, example: str, due_s: float) -> None:
        """A request will have no answer."""
        self._settle()
        self._fail(reason, example, due_s)

    def free(self, connection: Connection, now: float) -> None:
        """A connection waits for nothing: the next request, if there is one."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        elif not self.load.rate_per_s and not self.stopping:
            connection.send(now)
        else:
            self.idle.append(connection)

    def stop(self) -> None:
        """No more requests; those that are due and could not be sent are failures."""
        self.stopping = True
        for due_s in self._waiting:
            self._fail("never sent", "all clients waited for answers: more --clients, or a lower --rate", due_s)
        self._waiting.clear()
        if not self._under_way:
            self.finished.set()

    def result(self, cpu_share: float) -> Result:
        """The figures."""
        latencies, load = self._latencies, self.load
        p50, p90, p99 = (latencies.percentile_s(percent) * 1e3 for percent in (50, 90, 99))
        rows_per_s = self._rows_in_window / load.duration_s
        return Result(
            requests=latencies.count,
            rows_per_s=rows_per_s,
            requests_per_s=rows_per_s / load.rows,
            mean_ms=latencies.total_s / max(1, latencies.count) * 1e3,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            max_ms=latencies.longest_s * 1e3,
            failures=dict(self._failures),
            example=self._example,
            partial=self._partial,
            cpu_share=cpu_share,
        )

    def _settle(self) -> None:
        self._under_way -= 1
        if self.stopping and not self._under_way:
            self.finished.set()

    def _counts(self, due_s: float) -> bool:
        return self._from_s <= due_s < self._until_s

    def _fail(self, reason: str, example: str, due_s: float) -> None:
        if self._counts(due_s):
            self._failures[reason] += 1
            self._example = self._example or example


class Connection(asyncio.Protocol):
    """One client, connected again when it loses its connection."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._stream = AnswerStream(generator.known)
        self._transport: asyncio.Transport | None = None
        self._due_s = 0.0
        self._sent_s: float | None = None
        self._reconnecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect.

        Raises OSError or TimeoutError.
        """
        load = self._generator.load
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(loop.create_connection(lambda: self, load.host, load.port), CONNECT_S)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin anew."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a TCP connection's is one
        self._transport, self._stream = transport, AnswerStream(self._generator.known)

    def send(self, due_s: float) -> None:
        """Send the next request."""
        assert self._transport is not None  # noqa: S101 - a connection is free only when it has one
        self._due_s, self._sent_s = due_s, time.perf_counter()
        self._transport.write(self._generator.message())

    def data_received(self, data: bytes) -> None:
        """Take the answer, and go on."""
        if self._sent_s is None:
            return
        try:
            answer = self._stream.feed(data)
        except NotHttp as error:
            self._lose("not understood", str(error))
            return
        if answer is None:
            return
        now = time.perf_counter()
        self._sent_s = None
        self._generator.answered(answer, self._due_s, now)
        if answer.closes:
            self._lose("", "")
        else:
            self._generator.free(self, now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the request that was waiting."""
        self._lose("connection lost", str(exc or "closed by the server"))

    def check(self, now: float) -> None:
        """Give a request up that waits too long for its answer."""
        timeout_s = self._generator.load.timeout_s
        if self._sent_s is not None and now - self._sent_s > timeout_s:
            self._lose("no answer", f"no answer within {timeout_s:g} s")

    def close(self) -> None:
        """Close it, whatever it waits for."""
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def _lose(self, reason: str, example: str) -> None:
        """Drop the connection, count what waited for it, and connect again."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        transport.abort()
        waited, self._sent_s = self._sent_s is not None, None
        with contextlib.suppress(ValueError):
            self._generator.idle.remove(self)
        if waited:
            self._generator.failed(reason, example, self._due_s)
        self._reconnecting = asyncio.get_running_loop().create_task(self._connect_again())

    async def _connect_again(self) -> None:
        while True:
            try:
                await self.connect()
            except (OSError, TimeoutError):
                await asyncio.sleep(RECONNECT_S)
            else:
                self._generator.free(self, time.perf_counter())
                return
