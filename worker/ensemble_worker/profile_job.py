"""The job of measuring members beside what serves: one at a time, each member in a capped child process of its own.

A child is `python -m ensemble_worker measure` at the least priority; what it prints is kept line by line, so that a job
that was ended or a worker that was restarted goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ensemble_contract.plan import MAX_BATCH_SIZE, ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.devices import Device
from ensemble_worker.profile_store import Found, Point, ProfileStore

_LOG = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20
MAX_TASKS = 256
KEPT_ERROR_BYTES = 4096
# A child that says nothing for so long hangs: the largest models load in less.
SILENCE_S = 1800.0
# Less than this is no measurement's worth of memory.
LEAST_BYTES = 32 << 20


class ProfileTask(msgspec.Struct, frozen=True, rename="camel"):
    """A member to measure at some batch sizes; empty inputs or outputs: the model tells.

    `budget_s` is for its batches, once it is loaded; the smallest size is measured in any case.
    """

    source: ModelSource
    sizes: tuple[int, ...]
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    budget_s: float = 30.0

    def __post_init__(self) -> None:
        """Check sizes and budget. Raises ValueError naming the member."""
        name = self.source.name
        if not self.sizes or not all(1 <= size <= MAX_BATCH_SIZE for size in self.sizes):
            raise ValueError(f"sizes of {name!r}: at least one, each in 1..{MAX_BATCH_SIZE}")
        if not (math.isfinite(self.budget_s) and self.budget_s >= 0):
            raise ValueError(f"budgetS of {name!r}: {self.budget_s} is below 0")


class ProfileOrder(msgspec.Struct, frozen=True, rename="camel"):
    """What to measure, in this order. `id` is the asker's name for it."""

    tasks: tuple[ProfileTask, ...]
    id: str = ""

    def __post_init__(self) -> None:
        """Check how many there are. Raises ValueError."""
        if len(self.tasks) > MAX_TASKS:
            raise ValueError(f"tasks: {len(self.tasks)} are over {MAX_TASKS}")


class Line(msgspec.Struct, frozen=True, rename="camel"):
    """Any line that a measuring process prints."""

    signature: dict[str, Any] | None = None
    overhead_bytes: int = 0
    batch_size: int = 0
    rows_per_s: float = 0.0
    latency_s: float = 0.0
    memory_bytes: int = 0
    spread: float = 0.0
    form: str = ""
    error: str = ""
    downloaded_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(slots=True, eq=False)
class Progress:
    """How far a task is."""

    task: ProfileTask
    found: Found = field(default_factory=Found)
    error: str = ""
    finished: bool = False
    downloaded_bytes: int | None = None
    total_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "member": self.task.source.name,
            "digest": self.task.source.digest,
            "signature": self.found.signature,
            "overheadBytes": self.found.overhead_bytes,
            "points": self.found.points,
            "error": self.error or None,
            "finished": self.finished,
            "downloadedBytes": self.downloaded_bytes,
            "totalBytes": self.total_bytes,
        }


class ProfileJob:
    """The worker's one job. `spare_bytes` says how much memory a child may take now; None leaves it to the child."""

    def __init__(
        self, device: Device, cache_dir: Path, store: ProfileStore, spare_bytes: Callable[[], int | None]
    ) -> None:
        self.measured_points = 0
        self._device = device
        self._cache_dir = cache_dir
        self._store = store
        self._spare_bytes = spare_bytes
        self._order: ProfileOrder | None = None
        self._progress: list[Progress] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        """`idle`, `running` or `done`."""
        if self._order is None:
            return "idle"
        return "done" if self._running is None or self._running.done() else "running"

    def as_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "id": self._order.id if self._order is not None else "",
            "state": self.state,
            "results": [progress.as_json() for progress in self._progress],
        }

    async def start(self, order: ProfileOrder) -> None:
        """Measure what is ordered and not known; the same order goes on, another takes its place.

        One that is done is looked at again if it comes under a new id: what failed is tried once more.
        """
        former = self._order
        if former is not None and former.tasks == order.tasks:
            failed = any(progress.error for progress in self._progress)
            if self.state == "running" or former.id == order.id or not failed:
                self._order = order
                return
        await self.end()
        self._order = order
        self._progress = [Progress(task, self._store.recall(task.source)) for task in order.tasks]
        self._running = asyncio.create_task(self._run())

    async def end(self) -> None:
        """End measuring; what was found is kept."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        self._order, self._running, self._progress = None, None, []

    async def _run(self) -> None:
        for progress in self._progress:
            name = progress.task.source.name
            try:
                await self._measure(progress)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                progress.error = f"member {name!r} cannot be measured: {type(error).__name__}: {error}"
                _LOG.error("%s", progress.error)
            progress.finished = True

    async def _measure(self, progress: Progress) -> None:
        # Another task of this job may have measured it.
        progress.found = self._store.recall(progress.task.source)
        sizes = progress.found.missing(progress.task.sizes)
        if not sizes:
            return
        spare_bytes = self._spare_bytes()
        if spare_bytes is not None and spare_bytes < LEAST_BYTES:
            progress.error = (
                f"member {progress.task.source.name!r} cannot be measured: beside what runs here {spare_bytes >> 20} "
                "MiB are free: give the device more memory, or the member a profile"
            )
            return
        _LOG.info("measuring %s at %s rows", progress.task.source.name, ", ".join(map(str, sizes)))
        child = await asyncio.create_subprocess_exec(
            *self._command(progress.task, sizes, spare_bytes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True, limit=MAX_LINE_BYTES,
        )  # fmt: skip
        try:
            await self._follow(child, progress)
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()

    async def _follow(self, child: asyncio.subprocess.Process, progress: Progress) -> None:
        """Give a child its question and take what it says until it ends."""
        if child.stdin is None or child.stdout is None or child.stderr is None:
            raise AssertionError("all three were asked for")
        words = asyncio.create_task(_last_words(child.stderr))
        try:
            task = progress.task
            spec = {"member": task.source, "inputs": task.inputs, "outputs": task.outputs}
            with contextlib.suppress(ConnectionError):  # it may end without reading
                child.stdin.write(msgspec.json.encode(spec))
                await child.stdin.drain()
            child.stdin.close()
            while text := await asyncio.wait_for(child.stdout.readline(), SILENCE_S):
                self._take(msgspec.json.decode(text, type=Line), progress)
            code = await child.wait()
            if code != 0 and not progress.error:
                said = await asyncio.wait_for(words, SILENCE_S)
                progress.error = f"member {task.source.name!r}: measuring {_ended(code)}{said and f': {said}'}"
                _LOG.error("%s", progress.error)
        except TimeoutError:
            progress.error = f"member {progress.task.source.name!r}: measuring said nothing for {SILENCE_S:.0f} s"
        finally:
            words.cancel()

    def _take(self, line: Line, progress: Progress) -> None:
        progress.downloaded_bytes, progress.total_bytes = line.downloaded_bytes, line.total_bytes
        found = progress.found
        if line.signature is not None:
            found = msgspec.structs.replace(found, signature=line.signature, overhead_bytes=line.overhead_bytes)
        elif line.batch_size and not line.error:
            point = Point(
                line.batch_size, line.rows_per_s, line.latency_s, line.memory_bytes, line.spread, line.form
            )  # fmt: skip
            found = found.with_point(point)
            self.measured_points += 1
        if line.error:
            progress.error = line.error
            _LOG.warning("measuring: %s", line.error)
        if found is not progress.found:
            progress.found = found
            self._store.keep(progress.task.source, found)

    def _command(self, task: ProfileTask, sizes: tuple[int, ...], spare_bytes: int | None) -> list[str]:
        device = self._device
        command = [sys.executable, "-m", "ensemble_worker", "measure", "--device", device.name, "--nice"]
        if device.threads:
            command += ["--threads", str(device.threads)]
        elif device.cores:
            command += ["--cores", ",".join(map(str, device.cores))]
        if spare_bytes is not None:
            command += ["--memory-limit", str(spare_bytes)]
        command += ["--spec", "-", "--sizes", ",".join(map(str, sizes)), "--budget-s", f"{task.budget_s:g}"]
        return [*command, "--cache-dir", str(self._cache_dir), "--parent-pid", str(os.getpid())]


async def _last_words(stream: asyncio.StreamReader) -> str:
    """The last line of what a child wrote to its standard error."""
    kept = b""
    while chunk := await stream.read(KEPT_ERROR_BYTES):
        kept = (kept + chunk)[-KEPT_ERROR_BYTES:]
    lines = [line for line in kept.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code == -signal.SIGKILL:
        return "was killed, which the kernel does when memory runs out"
    return f"ended with signal {-code}" if code < 0 else f"ended with code {code}"
