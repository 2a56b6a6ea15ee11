"""The load of `ensemble bench`: `python -m ensemble_operator.load.loadgen PARENT_PID`, a process of its own.

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
from collections.abc import Callable, Sequence

import msgspec

from ensemble_contract.orphan import die_with_parent
from ensemble_operator.load.clients import CONNECT_S, Connection, Generator
from ensemble_operator.load.loads import Line, Load, Progress, Result, due_times, requests_of

SENT_AT_ONCE = 16
PROGRESS_S = 0.5
# select(2) takes no file descriptor above 1023.
MAX_SELECT_CLIENTS = 900


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
