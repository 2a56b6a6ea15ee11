"""The job of measuring members beside what serves: one at a time, each member in a capped child process of its own.

A child is `python -m ensemble_worker measure` at the least priority; what it prints is kept line by line, so that a job
that was ended or a worker that was restarted goes on where it was. Last, where that is ordered, `colocate` finds out
what the device gets done when members share it: of a class of devices once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ensemble_contract.plan import MAX_BATCH_SIZE, ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker import colocation
from ensemble_worker.devices import Device
from ensemble_worker.errors import OutOfMemory
from ensemble_worker.measuring_process import conduct
from ensemble_worker.profile_store import Found, Point, ProfileStore

_LOG = logging.getLogger(__name__)

MAX_TASKS = 256
FAILURES = (OSError, ValueError, msgspec.DecodeError)
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


class ColocationTask(msgspec.Struct, frozen=True, rename="camel"):
    """Members to run together, each alone before. `budget_s` is for all of it, once they are loaded."""

    members: tuple[colocation.Shared, ...]
    budget_s: float = colocation.BUDGET_S

    def __post_init__(self) -> None:
        """Check members and budget. Raises ValueError."""
        if not 2 <= len(self.members) <= MAX_TASKS:
            raise ValueError(f"colocation.members: 2 to {MAX_TASKS} share a device, got {len(self.members)}")
        for shared in self.members:
            if not 1 <= shared.batch_size <= MAX_BATCH_SIZE:
                raise ValueError(f"colocation.members: batchSize of {shared.source.name!r}: not in 1..{MAX_BATCH_SIZE}")
        if not (math.isfinite(self.budget_s) and 0 < self.budget_s <= colocation.LONGEST_S):
            raise ValueError(f"colocation.budgetS: {self.budget_s} is not above 0 and at most {colocation.LONGEST_S:g}")


class ProfileOrder(msgspec.Struct, frozen=True, rename="camel"):
    """What to measure, in this order. `id` is the asker's name for it."""

    tasks: tuple[ProfileTask, ...]
    id: str = ""
    colocation: ColocationTask | None = None

    def __post_init__(self) -> None:
        """Check how many there are. Raises ValueError."""
        if len(self.tasks) > MAX_TASKS:
            raise ValueError(f"tasks: {len(self.tasks)} are over {MAX_TASKS}")

    def same_work(self, other: ProfileOrder) -> bool:
        """Whether both order the same, by whatever name."""
        return (self.tasks, self.colocation) == (other.tasks, other.colocation)


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
    kind: str = ""
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
            "sizes": self.task.sizes,
            "signature": self.found.signature,
            "overheadBytes": self.found.overhead_bytes,
            "points": self.found.points,
            "error": self.error or None,
            "finished": self.finished,
            "downloadedBytes": self.downloaded_bytes,
            "totalBytes": self.total_bytes,
        }


@dataclass(slots=True, eq=False)
class Sharing:
    """What has become of a colocation task."""

    found: colocation.Factor
    finished: bool = False

    def as_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        found = self.found
        return {
            "factor": found.factor or None,
            "alone": found.alone,
            "together": found.together,
            "error": found.error or None,
            "finished": self.finished,
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
        self._sharing: Sharing | None = None
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
            "colocation": self._sharing.as_json() if self._sharing is not None else None,
        }

    async def start(self, order: ProfileOrder) -> None:
        """Measure what is ordered and not known; the same order goes on, another takes its place.

        One that is done is looked at again if it comes under a new id: what failed is tried once more.
        """
        former = self._order
        if former is not None and former.same_work(order):
            errors = [progress.error for progress in self._progress]
            errors += [self._sharing.found.error] if self._sharing is not None else []
            if self.state == "running" or former.id == order.id or not any(errors):
                self._order = order
                return
        await self.end()
        self._order = order
        self._progress = [Progress(task, self._store.recall(task.source)) for task in order.tasks]
        self._sharing = Sharing(self._store.recall_factor()) if order.colocation is not None else None
        self._running = asyncio.create_task(self._run())

    async def end(self) -> None:
        """End measuring; what was found is kept."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
        self._order, self._running, self._progress, self._sharing = None, None, [], None

    async def _run(self) -> None:
        for progress in self._progress:
            name = progress.task.source.name
            try:
                await self._measure(progress)
            except FAILURES as error:
                progress.error = f"member {name!r} cannot be measured: {type(error).__name__}: {error}"
                _LOG.error("%s", progress.error)
            progress.finished = True
        order, sharing = self._order, self._sharing
        if order is None or order.colocation is None or sharing is None:
            return
        try:
            await self._share(order.colocation, sharing)
        except FAILURES as error:
            sharing.found = colocation.Factor(error=f"co-location: {type(error).__name__}: {error}")
            _LOG.error("%s", sharing.found.error)
        sharing.finished = True

    async def _measure(self, progress: Progress) -> None:
        # Another task of this job may have measured it.
        progress.found = self._store.recall(progress.task.source)
        task, spare_bytes = progress.task, self._spare_bytes()
        if any(progress.found.is_too_large(size, spare_bytes) for size in task.sizes):
            progress.error = progress.found.error
        sizes = progress.found.missing(task.sizes, spare_bytes)
        if not sizes:
            return
        if too_little := _too_little(spare_bytes):
            progress.error = (
                f"member {task.source.name!r} cannot be measured: {too_little}: give the device more memory, or the "
                "member a profile"
            )
            return
        _LOG.info("measuring %s at %s rows", task.source.name, ", ".join(map(str, sizes)))
        rest = ["--spec", "-", "--sizes", ",".join(map(str, sizes)), "--budget-s", f"{task.budget_s:g}"]
        if known := progress.found.before(sizes[0]):
            rest += ["--known", f"{known.batch_size}:{known.latency_s!r}"]
        command = self._command("measure", spare_bytes, *rest)
        spec = {"member": task.source, "inputs": task.inputs, "outputs": task.outputs}

        def take(text: bytes) -> None:
            self._take(msgspec.json.decode(text, type=Line), progress, spare_bytes)

        how = await conduct(command, spec, take)
        if how and not progress.error:
            progress.error = f"member {task.source.name!r}: measuring {how}"
            _LOG.error("%s", progress.error)

    async def _share(self, task: ColocationTask, sharing: Sharing) -> None:
        if sharing.found.factor:
            return
        names = ", ".join(shared.source.name for shared in task.members)
        spare_bytes = self._spare_bytes()
        if too_little := _too_little(spare_bytes):
            sharing.found = colocation.Factor(error=f"{names} cannot be run together: {too_little}")
            return
        _LOG.info("measuring %s together", names)
        command = self._command("colocate", spare_bytes, "--budget-s", f"{task.budget_s:g}")

        def take(text: bytes) -> None:
            sharing.found = msgspec.json.decode(text, type=colocation.Factor)

        how = await conduct(command, {"members": task.members}, take)
        if not (sharing.found.factor or sharing.found.error):
            how = how or "ended without a result"
            sharing.found = colocation.Factor(error=f"measuring {names} together {how}")
        if sharing.found.factor:
            self._store.keep_factor(sharing.found)
        else:
            _LOG.warning("co-location is not measured: %s", sharing.found.error)

    def _take(self, line: Line, progress: Progress, spare_bytes: int | None) -> None:
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
            if line.batch_size and line.kind == OutOfMemory.kind:
                found = found.with_failure(line.batch_size, spare_bytes, line.error)
            progress.error = line.error
            _LOG.warning("measuring: %s", line.error)
        if found is not progress.found:
            progress.found = found
            self._store.keep(progress.task.source, found)

    def _command(self, what: str, spare_bytes: int | None, *rest: str) -> list[str]:
        device = self._device
        command = [sys.executable, "-m", "ensemble_worker", what, "--device", device.name, "--nice"]
        if device.threads:
            command += ["--threads", str(device.threads)]
        elif device.cores:
            command += ["--cores", ",".join(map(str, device.cores))]
        if spare_bytes is not None:
            command += ["--memory-limit", str(spare_bytes)]
        return [*command, *rest, "--cache-dir", str(self._cache_dir), "--parent-pid", str(os.getpid())]


def _too_little(spare_bytes: int | None) -> str:
    """Why there is no memory to measure in; empty where there is."""
    if spare_bytes is None or spare_bytes >= LEAST_BYTES:
        return ""
    return f"beside what runs here {spare_bytes >> 20} MiB are free"
