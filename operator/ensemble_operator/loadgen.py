"""The load of `ensemble bench`: `python -m ensemble_operator.loadgen PARENT_PID`, a process of its own.

Reads a `Load` from standard input, prints `Line`s: progress, then the result. Being a process of its own, it is not
disturbed by what else the command does, and its use of the CPU can be told.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import selectors
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from ensemble_contract.orphan import die_with_parent
from ensemble_operator.answer_stream import Answer, AnswerStream, Known, NotHttp
from ensemble_operator.latencies import Latencies
from ensemble_operator.loads import Line, Load, Progress, Result, due_times, requests_of

CONNECT_S = 10.0
RECONNECT_S = 0.1
SENT_AT_ONCE = 16
PROGRESS_S = 0.5
# select(2) takes no file descriptor above 1023.
MAX_SELECT_CLIENTS = 900


class Generator:
    """One load: what its connections share, and what is counted. Times are of `time.perf_counter`."""

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


async def generate(load: Load, say: Callable[[Line], None]) -> Result:
    """Run a load to its end, saying how it goes on."""
    messages = requests_of(load)
    generator = Generator(load, messages)
    connections = [Connection(generator) for _ in range(load.clients)]
    gc.disable()
    try:
        if refused := await _refusal(load, messages):
            return Result(refused=refused)
        for connection in connections:
            await connection.connect()
        return await _run(generator, connections, say)
    except (OSError, TimeoutError) as error:
        return Result(refused=f"no connection to {load.host}:{load.port}: {error or 'no answer in time'}")
    finally:
        gc.enable()
        for connection in connections:
            connection.close()


async def _refusal(load: Load, messages: Sequence[bytes]) -> str:
    """Why the server does not answer a first request; empty if it does: ten seconds of errors tell nothing more.

    Raises OSError or TimeoutError if it cannot be connected to.
    """
    probe = Generator(load, messages)
    connection = Connection(probe)
    await connection.connect()
    try:
        probe.begin(time.perf_counter() - load.warmup_s)
        probe.stopping = True
        connection.send(time.perf_counter())
        await asyncio.wait_for(probe.finished.wait(), load.timeout_s)
    except TimeoutError:
        return f"the first request has no answer within {load.timeout_s:g} s"
    finally:
        connection.close()
    reason, example = next(iter(probe.result(0.0).failures), ""), probe.result(0.0).example
    return f"the first request failed: {reason}: {example}" if reason else ""


async def _run(generator: Generator, connections: list[Connection], say: Callable[[Line], None]) -> Result:
    load = generator.load
    begin = time.perf_counter()
    generator.begin(begin)
    window = [time.perf_counter(), time.process_time()]
    for connection in connections:
        generator.free(connection, begin)
    pacing = asyncio.create_task(_pace(generator, begin)) if load.rate_per_s else None
    watching = asyncio.create_task(_watch(generator, connections, begin, say))
    try:
        await asyncio.sleep(load.warmup_s + load.duration_s - (time.perf_counter() - begin))
        cpu_share = (time.process_time() - window[1]) / (time.perf_counter() - window[0])
        if pacing is not None:
            pacing.cancel()
        generator.stop()
        # Requests without an answer are given up by the watch, each by its own deadline.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(generator.finished.wait(), load.timeout_s + CONNECT_S)
    finally:
        watching.cancel()
    return generator.result(cpu_share)


async def _pace(generator: Generator, begin: float) -> None:
    """Have requests fall due; the late are sent at once, and their latency counts from when they were due."""
    for number, due_s in enumerate(due_times(generator.load)):
        ahead_s = begin + due_s - time.perf_counter()
        # Answers must be read even while everything is late.
        if ahead_s > 0 or number % SENT_AT_ONCE == 0:
            await asyncio.sleep(max(0.0, ahead_s))
        generator.fell_due(begin + due_s)


async def _watch(
    generator: Generator, connections: list[Connection], begin: float, say: Callable[[Line], None]
) -> None:
    rows, then = 0, begin
    while True:
        await asyncio.sleep(PROGRESS_S)
        now = time.perf_counter()
        for connection in connections:
            connection.check(now)
        if not generator.stopping:
            rows_per_s = (generator.answered_rows - rows) / (now - then)
            say(Line(progress=Progress(now - begin, rows_per_s, generator.failures)))
        rows, then = generator.answered_rows, now


def event_loop(load: Load) -> asyncio.AbstractEventLoop:
    """An open loop's timers need the microseconds of select(2); epoll rounds them up to milliseconds."""
    if load.rate_per_s and load.clients <= MAX_SELECT_CLIENTS:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())
    return asyncio.new_event_loop()


def main() -> None:
    """Answer one load."""
    die_with_parent(int(sys.argv[1]))
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)

    def say(line: Line) -> None:
        sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        sys.stdout.flush()

    with asyncio.Runner(loop_factory=lambda: event_loop(load)) as runner:
        say(Line(result=runner.run(generate(load, say))))


if __name__ == "__main__":
    main()
