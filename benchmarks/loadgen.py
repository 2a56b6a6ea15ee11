"""The load: a closed loop over keep-alive connections at protocol level, in a process of its own.

`python -m benchmarks.loadgen FOLDER PARENT_PID` answers each `Window` (a JSON line) with a `WindowResult`. A
connection sends its next request when its answer is there; requests differ; every answer is compared with the right
one when the window is over.

What is counted begins with the answer by which every connection has had its first (and `warm_s` has passed), and ends
with the first answer after `window_s` that makes the count a multiple of the connections: answers that come in
bunches, as those of a batch do, are then counted in whole bunches, so that short windows of slow networks are not off
by a part of one. Afterwards the requests in flight are awaited, so that the next server starts on an idle machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from array import array
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
import uvloop

from benchmarks import workloads
from benchmarks.answers import AnswerStream, BadAnswer, Target, request_head
from benchmarks.children import answer_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Array, Workload

# Requests up to this size in sum are kept as whole byte strings; larger ones are written as head and a view of the
# rows.
MAX_PREPARED_BYTES = 64 << 20
MAX_UNCHECKED_BYTES = 128 << 20
CHECK_CHUNK_BYTES = 4 << 20
MAX_FAILURES = 1000


class Window(msgspec.Struct, frozen=True):
    """One measurement. `timeout_s` bounds the whole of it, however slow the server is."""

    target: Target
    connections: int
    rows: int
    window_s: float
    warm_s: float = 0.1
    timeout_s: float = 120.0


class WindowResult(msgspec.Struct, frozen=True):
    """What was counted.

    `wrong` answers and `failures` (errors, lost connections, no answer in time) include those outside the count.
    `cpu_share` is this process's CPU time over wall time: near 1.0 it is the load that limits.
    """

    requests: int
    rows_per_s: float
    p50_ms: float
    p99_ms: float
    failures: int
    wrong: int
    checked: int
    cpu_share: float
    cpu_us_per_request: float
    error: str = ""


class Requests:
    """The requests of a window: number k asks for `rows` rows from row k on, around the pool."""

    def __init__(self, target: Target, workload: Workload, rows: int, inputs: Array, expected: Array) -> None:
        count = len(inputs)
        around = np.arange(count + rows) % count
        head = request_head(target, workload, rows)
        bodies = np.ascontiguousarray(inputs[around]).view(np.uint8).reshape(count + rows, -1)
        views = [bodies[k : k + rows].data.cast("B") for k in range(count)]
        if count * rows * workload.input.row_bytes <= MAX_PREPARED_BYTES:
            self.messages: list[Sequence[bytes | memoryview]] = [(head + view,) for view in views]
        else:
            self.messages = [(head, view) for view in views]
        self._expected = expected[around].reshape(count + rows, -1)
        self._dtype = workload.output.dtype
        self._rows = rows

    def wrong(self, numbers: array[int], answers: list[bytes]) -> int:
        """How many of the answers are not the right ones for their requests."""
        if not answers:
            return 0
        chunk = max(1, CHECK_CHUNK_BYTES // len(answers[0]))
        found = 0
        for start in range(0, len(answers), chunk):
            part = answers[start : start + chunk]
            starts = np.asarray(numbers[start : start + chunk])
            given = np.frombuffer(b"".join(part), self._dtype).reshape(len(part), -1)
            right = self._expected[starts[:, None] + np.arange(self._rows)].reshape(len(part), -1)
            found += int((~workloads.matches(given, right)).sum())
        return found


class Run:
    """The state that the connections of one window share."""

    def __init__(self, window: Window, requests: Requests, clock: float) -> None:
        self._window = window
        self._requests = requests
        self._warm_until = clock + window.warm_s
        self._beginners = window.connections
        self._deadline = 0.0
        self._numbers = array("l")
        self._answers: list[bytes] = []
        self._answer_bytes = 0
        self._started_s = self._stopped_s = 0.0
        self._cpu_started_s = self._cpu_stopped_s = 0.0
        self.latencies_s = array("d")
        self.counting = False
        self.stopping = False
        self.failures = 0
        self.wrong = 0
        self.checked = 0
        self.error = ""
        self.in_flight = 0
        self.idle = asyncio.Event()

    def answered(self, number: int, answer: bytes, latency_s: float, now: float, first: bool) -> None:
        """Take an answer in; decides when counting begins and when the window stops."""
        self._numbers.append(number)
        self._answers.append(answer)
        self._answer_bytes += len(answer)
        if self.counting:
            self.latencies_s.append(latency_s)
            if now >= self._deadline and len(self.latencies_s) % self._window.connections == 0:
                self._stop(now)
        elif not self.stopping:
            self._beginners -= first
            if self._beginners <= 0 and now >= self._warm_until:
                self.counting = True
                self._started_s, self._cpu_started_s = now, time.process_time()
                self._deadline = now + self._window.window_s
        if self._answer_bytes > MAX_UNCHECKED_BYTES:
            self.check()

    def failed(self, error: str, first: bool) -> None:
        """Count a request that got no right answer; too many end the window."""
        self.failures += 1
        self._beginners -= first
        self.error = self.error or error
        if self.failures >= MAX_FAILURES and not self.stopping:
            self._stop(time.perf_counter())

    def check(self) -> None:
        """Compare all answers that were not yet compared."""
        self.wrong += self._requests.wrong(self._numbers, self._answers)
        self.checked += len(self._answers)
        self._numbers, self._answers, self._answer_bytes = array("l"), [], 0

    def result(self) -> WindowResult:
        """The figures, after everything was checked."""
        self.check()
        count, wall_s = len(self.latencies_s), self._stopped_s - self._started_s
        cpu_s = self._cpu_stopped_s - self._cpu_started_s
        if not count or wall_s <= 0:
            return WindowResult(
                0, 0.0, 0.0, 0.0, self.failures, self.wrong, self.checked, 0.0, 0.0, self.error or "nothing was counted"
            )
        p50, p99 = np.percentile(np.asarray(self.latencies_s) * 1e3, (50, 99))
        return WindowResult(
            requests=count,
            rows_per_s=count * self._window.rows / wall_s,
            p50_ms=float(p50),
            p99_ms=float(p99),
            failures=self.failures,
            wrong=self.wrong,
            checked=self.checked,
            cpu_share=cpu_s / wall_s,
            cpu_us_per_request=cpu_s / count * 1e6,
            error=self.error,
        )

    def _stop(self, now: float) -> None:
        self.counting, self.stopping = False, True
        self._stopped_s, self._cpu_stopped_s = now, time.process_time()


class Connection(asyncio.Protocol):
    """One client: sends, awaits the answer, sends the next."""

    def __init__(
        self, run: Run, messages: list[Sequence[bytes | memoryview]], stream: AnswerStream, first: int, stride: int
    ) -> None:
        self._run = run
        self._messages = messages
        self._stream = stream
        self._number = first % len(messages)
        self._stride = stride
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._waiting = False
        self._first = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; `start` sends."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def start(self) -> None:
        """Send the first request."""
        self._run.in_flight += 1
        self._send(time.perf_counter())

    def data_received(self, data: bytes) -> None:
        """Take the answer and send the next request."""
        if not self._waiting:
            return
        now = time.perf_counter()
        run = self._run
        try:
            answer = self._stream.feed(data)
        except BadAnswer as error:
            run.failed(str(error), self._first)
            if error.broken:
                self._leave()
                self.close()
                return
        else:
            if answer is None:
                return
            run.answered(self._number, answer, now - self._sent_s, now, self._first)
        self._first = False
        if run.stopping:
            self._leave()
            return
        self._number = (self._number + self._stride) % len(self._messages)
        self._send(now)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the request that was waiting."""
        if self._waiting:
            self._run.failed(f"the connection was lost: {exc or 'closed by the server'}", self._first)
            self._leave()

    def close(self) -> None:
        """Close the connection, whatever it waits for."""
        self._waiting = False
        assert self._transport is not None
        self._transport.abort()

    def _send(self, now: float) -> None:
        assert self._transport is not None
        self._sent_s = now
        self._waiting = True
        message = self._messages[self._number]
        if len(message) == 1:
            self._transport.write(message[0])
        else:
            self._transport.writelines(message)

    def _leave(self) -> None:
        self._waiting = False
        self._run.in_flight -= 1
        if not self._run.in_flight:
            self._run.idle.set()


async def measure(window: Window, workload: Workload, requests: Requests) -> WindowResult:
    """Run one window on the running loop."""
    loop = asyncio.get_running_loop()
    known: dict[bytes, int] = {}
    run = Run(window, requests, time.perf_counter())
    connections = []
    try:
        for index in range(window.connections):
            stream = AnswerStream(window.target, workload, window.rows, known)
            stride = window.connections | 1
            connection = Connection(run, requests.messages, stream, index, stride)
            await asyncio.wait_for(
                loop.create_connection(lambda c=connection: c, window.target.host, window.target.port),  # type: ignore[misc]
                timeout=10.0,
            )
            connections.append(connection)
        gc.disable()
        for connection in connections:
            connection.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.idle.wait(), window.timeout_s)
        if run.in_flight:
            run.failures += run.in_flight
            run.error = run.error or f"{run.in_flight} requests had no answer within {window.timeout_s:g} s"
    finally:
        gc.enable()
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)
    return run.result()


def main(arguments: Sequence[str]) -> None:
    """Answer windows until stdin closes."""
    folder, parent_pid = arguments
    workload = workloads.read(folder)
    inputs, expected = workload.rows(), workload.expected()
    prepared: dict[tuple[Target, int], Requests] = {}

    def answer(window: Window) -> WindowResult:
        key = (window.target, window.rows)
        if key not in prepared:
            prepared.clear()
            prepared[key] = Requests(window.target, workload, window.rows, inputs, expected)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(measure(window, workload, prepared[key]))

    answer_lines(Window, answer, int(parent_pid))


if __name__ == "__main__":
    main(sys.argv[1:])
