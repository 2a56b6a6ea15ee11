"""Child processes for real: kept running, ended as a group, and never left behind by a runner that was killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ensemble_operator.processes import Ended, Happening, KeptProcess, Program, Started, Wrote, run_once

DEADLINE_S = 15.0
READY = "print('up', flush=True)"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


class Witness:
    """Keeps what happens, and lets a test wait for it."""

    def __init__(self) -> None:
        self.seen: list[Happening] = []
        self._news = asyncio.Event()

    def __call__(self, happening: Happening) -> None:
        self.seen.append(happening)
        self._news.set()

    async def wait_for(self, fits: Callable[[Happening], bool], count: int = 1) -> Happening:
        """The `count`-th happening that fits, at most 15 s from now."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found = [h for h in self.seen if fits(h)]
                if len(found) >= count:
                    return found[count - 1]
                self._news.clear()
                await self._news.wait()


def wrote(line: str) -> Callable[[Happening], bool]:
    return lambda h: isinstance(h, Wrote) and h.line == line


async def gone(pid: int) -> None:
    """Wait until there is no such process, or only its zombie in somebody else's care."""
    async with asyncio.timeout(DEADLINE_S):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.02)


async def test_what_dies_is_started_again_and_what_is_stopped_is_not() -> None:
    witness = Witness()
    kept = KeptProcess(Program("p", python(f"import time; {READY}; time.sleep(60)"), 5.0), witness)
    kept.start()
    await witness.wait_for(wrote("up"))
    kept.mark_ready()
    first = kept.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    ended = await witness.wait_for(lambda h: isinstance(h, Ended))
    assert isinstance(ended, Ended)
    assert (ended.life.code, ended.life.was_ready, ended.lines) == (-9, True, ("up",))
    assert ended.restart_in_s == pytest.approx(0.2, abs=0.1)
    await witness.wait_for(wrote("up"), 2)
    assert kept.pid not in (None, first)
    assert kept.restarts == 1
    second = kept.pid
    await kept.stop()
    assert second is not None
    assert not psutil.pid_exists(second)
    assert len([h for h in witness.seen if isinstance(h, Ended)]) == 1
    assert kept.pid is None


async def test_what_never_becomes_ready_is_given_up_with_its_last_words() -> None:
    witness = Witness()
    kept = KeptProcess(Program("p", python("print('address in use'); raise SystemExit(6)"), 5.0), witness)
    kept.start()
    ended = await witness.wait_for(lambda h: isinstance(h, Ended))
    assert isinstance(ended, Ended)
    assert (ended.life.code, ended.restart_in_s, ended.lines) == (6, None, ("address in use",))
    await kept.stop()
    assert kept.gave_up
    assert len([h for h in witness.seen if isinstance(h, Started)]) == 1


async def test_a_program_that_cannot_be_started_says_so() -> None:
    witness = Witness()
    kept = KeptProcess(Program("p", ("/does/not/exist",), 5.0), witness)
    kept.start()
    line = await witness.wait_for(lambda h: isinstance(h, Wrote))
    assert isinstance(line, Wrote)
    assert line.line.startswith("cannot be started: ")
    async with asyncio.timeout(DEADLINE_S):
        await kept.stop()


async def test_one_that_ignores_sigterm_is_killed_after_its_grace_with_its_children() -> None:
    witness = Witness()
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    kept = KeptProcess(Program("p", python(code), 0.3), witness)
    kept.start()
    line = await witness.wait_for(lambda h: isinstance(h, Wrote))
    assert isinstance(line, Wrote)
    started = time.monotonic()
    await kept.stop()
    assert 0.3 <= time.monotonic() - started < 5.0
    await gone(int(line.line))


async def test_a_child_does_not_share_our_process_group() -> None:
    witness = Witness()
    kept = KeptProcess(Program("p", python(f"import time; {READY}; time.sleep(60)"), 5.0), witness)
    kept.start()
    await witness.wait_for(wrote("up"))
    assert kept.pid is not None
    assert os.getpgid(kept.pid) == kept.pid != os.getpgrp()
    await kept.stop()


async def test_output_without_line_ends_is_bounded() -> None:
    witness = Witness()
    code = (
        "import sys; sys.stdout.write('x' * 3_000_000); print(); print('end', flush=True); import time; time.sleep(60)"
    )
    kept = KeptProcess(Program("p", python(code), 5.0), witness)
    kept.start()
    await witness.wait_for(wrote("end"))
    lines = [h.line for h in witness.seen if isinstance(h, Wrote)]
    assert sum(map(len, lines)) == 3_000_003
    assert max(map(len, lines)) < 1_200_000
    await kept.stop()


async def test_run_once_feeds_reads_and_reports() -> None:
    lines: list[str] = []
    code = "import sys; print(sys.stdin.read()[::-1]); sys.stderr.write('careful\\n'); raise SystemExit(3)"
    answer = await run_once(python(code), lines.append, stdin=b"abc")
    assert (lines, answer.code, answer.errors) == (["cba"], 3, ("careful",))


async def test_run_once_cancelled_leaves_nothing() -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = asyncio.create_task(run_once(python(code), seen.put_nowait))
    async with asyncio.timeout(DEADLINE_S):
        pid = int(await seen.get())
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert not psutil.pid_exists(pid)


CHILD = """
import os, sys, time
from ensemble_contract.orphan import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid())], start_new_session=True)
time.sleep(60)
"""


async def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    with subprocess.Popen(python(PARENT, str(child)), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.Process(pid).is_running()
        parent.kill()
        await gone(pid)


def test_a_child_whose_parent_is_gone_already_ends_at_once(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    done = subprocess.run(
        [sys.executable, str(child), "999999999"], capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def test_nobody_asked_and_nothing_happens(tmp_path: Path) -> None:
    code = "from ensemble_contract.orphan import die_with_parent; die_with_parent(0); print('alive')"
    done = subprocess.run(python(code), capture_output=True, timeout=DEADLINE_S, check=True)
    assert done.stdout == b"alive\n"
