"""Child processes: kept running by the restart rule, or run once for their answer. The only file that starts any.

Every child leads a session of its own: Ctrl-C on the terminal reaches the runner alone, which then drains in order, and
what a child has started itself is ended with it, as its process group. That the children end when the runner itself is
killed is their own doing (`ensemble_contract.orphan`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ensemble_operator.restarts import History, Life, restart_delay

READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 20
MAX_ANSWER_BYTES = 64 << 20
REMEMBERED_LINES = 20
PIPE_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Started:
    """A process runs."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended on its own. `restart_in_s` is None when it is given up. `lines` are the last it wrote."""

    name: str
    life: Life
    restart_in_s: float | None
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wrote:
    """A process wrote a line to its standard output or error."""

    name: str
    line: str


Happening = Started | Ended | Wrote


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, under which name, and how long it may take to end after SIGTERM."""

    name: str
    arguments: tuple[str, ...]
    grace_s: float


class KeptProcess:
    """A child that is started again when it ends, until it is stopped or given up. Lives on one event loop.

    `program` may be replaced: the next start runs the new one.
    """

    def __init__(self, program: Program, happened: Callable[[Happening], None]) -> None:
        self.program = program
        self.history = History()
        self.gave_up = False
        self._happened = happened
        self._ready = False
        self._pid: int | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while one runs."""
        return self._pid

    @property
    def ready(self) -> bool:
        """Whether the process that runs now was said to be ready."""
        return self._ready and self._pid is not None

    @property
    def restarts(self) -> int:
        """How many times it ended on its own."""
        return self.history.count

    def mark_ready(self) -> None:
        """Say that the process that runs now does its work, which the restart rule remembers."""
        self._ready = True

    def start(self) -> None:
        """Begin to keep it running, as a task of the current event loop."""
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"keep {self.program.name}")

    async def stop(self) -> None:
        """End it: SIGTERM, then, when its grace is over, SIGKILL to its group. Returns when it is reaped."""
        self._stopping.set()
        if self._task is None:
            return
        self._signal(signal.SIGTERM)
        await asyncio.wait([self._task], timeout=self.program.grace_s)
        self.kill()
        await self._task

    def kill(self) -> None:
        """End it and all that it has started, now. A process that this ends before `stop` is started again."""
        if self._pid is not None:
            kill_group(self._pid)

    def _signal(self, number: signal.Signals) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)

    async def _keep(self) -> None:
        while not self._stopping.is_set():
            delay_s = restart_delay(self.history, time.monotonic())
            if delay_s is None:
                self.gave_up = True
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            if not self._stopping.is_set():
                await self._live()

    async def _live(self) -> None:
        """One life, from start to end, and the report of its end unless it was asked for."""
        name, started_at = self.program.name, time.monotonic()
        lines: deque[str] = deque(maxlen=REMEMBERED_LINES)

        def wrote(line: str) -> None:
            lines.append(line)
            self._happened(Wrote(name, line))

        try:
            process = await _spawn(self.program.arguments, stderr=asyncio.subprocess.STDOUT)
        except OSError as error:
            wrote(f"cannot be started: {error}")
            code = 1
        else:
            self._pid = process.pid
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
            self._happened(Started(name, process.pid))
            code = await _reap(process, wrote)
        life = Life(started_at, time.monotonic(), code, self._ready)
        self._pid, self._ready = None, False
        if not self._stopping.is_set():
            self.history = self.history.after(life)
            self._happened(Ended(name, life, restart_delay(self.history, time.monotonic()), tuple(lines)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program that ran once left: its exit code and the last lines of its standard error."""

    code: int
    errors: tuple[str, ...]


async def run_once(
    arguments: Sequence[str],
    on_line: Callable[[str], None],
    *,
    on_error: Callable[[str], None] | None = None,
    stdin: bytes = b"",
) -> Answer:
    """Run a program to its end, giving each line of its standard output to `on_line` as it comes, of its error too.

    Cancelled, it ends the program and its group first. Raises OSError if it cannot be started.
    """
    process = await _spawn(arguments, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    errors: deque[str] = deque(maxlen=REMEMBERED_LINES)
    assert process.stdin is not None  # noqa: S101 - asked for above
    assert process.stderr is not None  # noqa: S101

    def said(line: str) -> None:
        errors.append(line)
        if on_error is not None:
            on_error(line)

    reading = asyncio.create_task(_read_lines(process.stderr, said))
    try:
        with contextlib.suppress(ConnectionError):  # it may end without reading
            process.stdin.write(stdin)
            await process.stdin.drain()
        process.stdin.close()
        code = await _reap(process, on_line)
        await asyncio.wait([reading], timeout=PIPE_CLOSE_S)
    finally:
        reading.cancel()
        if process.returncode is None:
            kill_group(process.pid)
            await process.wait()
    return Answer(code, tuple(errors))


class Conversation:
    """A child that answers each line on its standard input with a line. One question at a time; `end` it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._errors: deque[str] = deque(maxlen=REMEMBERED_LINES)
        assert process.stderr is not None  # noqa: S101 - asked for below
        self._reading = asyncio.create_task(_read_lines(process.stderr, self._errors.append))

    @staticmethod
    async def start(arguments: Sequence[str]) -> Conversation:
        """Start the program.

        Raises OSError if it cannot be started.
        """
        return Conversation(
            await asyncio.create_subprocess_exec(
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=MAX_ANSWER_BYTES,
            )
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The last line that it wrote to standard error."""
        return next((line for line in reversed(self._errors) if line.strip()), "no last words")

    async def ask(self, line: bytes) -> bytes:
        """The answer to a line.

        Raises ConnectionError if the child has ended.
        """
        process = self._process
        assert process.stdin is not None  # noqa: S101 - asked for above
        assert process.stdout is not None  # noqa: S101
        process.stdin.write(line + b"\n")
        await process.stdin.drain()
        answer = await process.stdout.readline()
        if not answer.endswith(b"\n"):
            await asyncio.wait([self._reading], timeout=PIPE_CLOSE_S)
            raise ConnectionError("the process ended")
        return answer

    async def end(self) -> None:
        """End it and what it has started."""
        kill_group(self._process.pid)
        await self._process.wait()
        await asyncio.wait([self._reading], timeout=PIPE_CLOSE_S)
        self._reading.cancel()
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        self._process.stdin.close()


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that `pid` leads, if there still is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _spawn(
    arguments: Sequence[str], *, stderr: int, stdin: int = asyncio.subprocess.DEVNULL
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *arguments, stdin=stdin, stdout=asyncio.subprocess.PIPE, stderr=stderr, start_new_session=True
    )


async def _reap(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> int:
    """Pass on its output until it ends; its exit code. What it has started and left behind is ended too."""
    assert process.stdout is not None  # noqa: S101 - always piped
    reading = asyncio.create_task(_read_lines(process.stdout, on_line))
    try:
        code = await process.wait()
        kill_group(process.pid)
        await asyncio.wait([reading], timeout=PIPE_CLOSE_S)
    finally:
        reading.cancel()
    return code


async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    """Every line without its end. One over 1 MiB is cut: a child that ends no line must not fill our memory."""
    rest = b""
    while chunk := await stream.read(READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            lines.append(rest)
            rest = b""
        for line in lines:
            on_line(line.decode(errors="replace").rstrip("\r"))
    if rest:
        on_line(rest.decode(errors="replace"))
