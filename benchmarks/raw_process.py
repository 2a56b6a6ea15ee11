"""One process of the raw bound (`raw` defines it): holds members on a device, runs batches of them alone or in step.

`python -m benchmarks.raw_process CONFIG PARENT_PID`: a `null` line loads and is answered with `Ready`, every further
line is a `ProcessWindow` and is answered with a `ProcessResult`.
"""

from __future__ import annotations

import os
import select
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks import workloads
from benchmarks.children import answer_lines
from benchmarks.plain_member import PlainMember
from ensemble_contract.plan import ModelSource
from ensemble_worker import devices, predictor
from ensemble_worker.stacks import Stacks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Array

POLL_S = 50e-6
GO, STOP = 1, 1 << 32
START_OFFSETS = 16


class ProcessConfig(msgspec.Struct, frozen=True):
    """What one process holds, and the eventfds (go, done) of its rounds: the first has those of all others.

    `plain`: members run as `torch.export.load` gives them, one after the other.
    """

    folder: str
    members: tuple[int, ...]
    cores: tuple[int, ...]
    threads: int
    max_batch: int
    plain: bool = False
    device: str = "cpu"
    others: tuple[tuple[int, int], ...] = ()
    pair: tuple[int, int] | None = None


class ProcessWindow(msgspec.Struct, frozen=True):
    """`rows` a round in batches of `batch`, in step with others or free, for `window_s` or so many `rounds`."""

    rows: int
    batch: int
    window_s: float
    in_step: bool
    rounds: int = 0


class ProcessResult(msgspec.Struct, frozen=True):
    """Rounds that this process took through its members, and the wall time from the first to the last."""

    rounds: int
    wall_s: float


class Ready(msgspec.Struct, frozen=True):
    """The members are loaded and answer right; the time of each for `max_batch` rows, in the order of the config."""

    member_s: tuple[float, ...]


class Process:
    """The members on a device, run over batches of the pool."""

    def __init__(self, config: ProcessConfig) -> None:
        self._config = config
        workload = workloads.read(config.folder)
        rows = workload.rows()
        # With its beginning once more behind its end, every batch lies there in one piece.
        self._pool = rows[np.arange(len(rows) + config.max_batch) % len(rows)]
        self._rows = self._pool[: len(rows)]
        device = self._device()
        self._members = [self._load(workload, workload.members[m], device) for m in config.members]
        with predictor.running_models():
            # Plain members are none of ours, and never stacked.
            self._stacks = Stacks({i: one for i, one in enumerate(self._members) if not isinstance(one, PlainMember)})
        # A GPU runs its co-located members side by side, a CPU device one batch at a time.
        self._threads = ThreadPoolExecutor(len(self._members)) if device.kind == "cuda" else None
        expected = workload.expected_of_members()
        with predictor.running_models():
            for index, member in zip(config.members, self._members, strict=True):
                self._check(workload.members[index].name, member, expected[index])

    def ready(self) -> Ready:
        """Time each member once more."""
        rows = self._batches(self._config.max_batch, self._config.max_batch, 0)[0]
        with predictor.running_models():
            return Ready(tuple(self._time(member, rows) for member in self._members))

    def run(self, window: ProcessWindow) -> ProcessResult:
        """One window, in the state of a worker's threads."""
        with predictor.running_models():
            return self._run(window)

    def _run(self, window: ProcessWindow) -> ProcessResult:
        rounds = [
            self._batches(window.rows, window.batch, k * len(self._rows) // START_OFFSETS) for k in range(START_OFFSETS)
        ]
        limit = window.rounds or sys.maxsize
        if not window.in_step:
            return self._run_free(rounds, window, limit)
        if self._config.pair is not None:
            return self._follow(rounds, self._config.pair)
        return self._lead(rounds, window, limit)

    def _device(self) -> devices.Device:
        if self._config.device != "cpu":
            return devices.find(self._config.device, devices.discover())
        os.sched_setaffinity(0, self._config.cores)
        working = self._config.cores[: self._config.threads]
        predictor.prepare_cpu(working, pin=False)
        return devices.cpu_device(working[0], working, devices.free_memory_bytes())

    def _load(
        self, workload: workloads.Workload, source: ModelSource, device: devices.Device
    ) -> predictor.Predictor | PlainMember:
        path = workloads.path_of(source)
        if self._config.plain:
            return PlainMember(path)
        return predictor.load(path, source, (workload.input,), (workload.output,), device, self._config.max_batch)

    def _check(self, name: str, member: predictor.Predictor | PlainMember, expected: Array) -> None:
        step = self._config.max_batch
        answers = np.concatenate([member.run([self._rows[i : i + step]])[0] for i in range(0, len(self._rows), step)])
        wrong = int((~workloads.matches(answers, expected)).sum())
        if wrong:
            raise ValueError(f"member {name!r}: {wrong} of {len(expected)} answers are not those of its network")

    def _time(self, member: predictor.Predictor | PlainMember, rows: Array) -> float:
        started = time.perf_counter()
        count = 0
        while count < 3 or time.perf_counter() - started < 0.05:
            member.run([rows])
            count += 1
        return (time.perf_counter() - started) / count

    def _batches(self, rows: int, batch: int, start: int) -> list[Array]:
        begins = [((start + i) % len(self._rows), min(batch, rows - i)) for i in range(0, rows, batch)]
        return [self._pool[begin : begin + count] for begin, count in begins]

    def _round(self, batches: Sequence[Array]) -> None:
        for rows in batches:
            inputs = [rows]
            if self._threads is not None:
                list(self._threads.map(lambda member: member.run(inputs), self._members))  # noqa: B023 (awaited here)
                continue
            run_all(self._members, self._stacks, inputs)

    def _run_free(self, rounds: list[list[Array]], window: ProcessWindow, limit: int) -> ProcessResult:
        count = 0
        started = now = time.perf_counter()
        while count < limit and (not count or window.rounds or now - started < window.window_s):
            self._round(rounds[count % START_OFFSETS])
            count += 1
            now = time.perf_counter()
        return ProcessResult(count, now - started)

    def _lead(self, rounds: list[list[Array]], window: ProcessWindow, limit: int) -> ProcessResult:
        others = self._config.others
        count = 0
        started = now = time.perf_counter()
        while count < limit and (not count or window.rounds or now - started < window.window_s):
            for go, _ in others:
                os.eventfd_write(go, GO)
            self._round(rounds[count % START_OFFSETS])
            for _, done in others:
                _await(done)
            count += 1
            now = time.perf_counter()
        for go, _ in others:
            os.eventfd_write(go, STOP)
        return ProcessResult(count, now - started)

    def _follow(self, rounds: list[list[Array]], pair: tuple[int, int]) -> ProcessResult:
        go, done = pair
        count = 0
        started = time.perf_counter()
        while _await(go) < STOP:
            self._round(rounds[count % START_OFFSETS])
            os.eventfd_write(done, GO)
            count += 1
        return ProcessResult(count, time.perf_counter() - started)


def run_all(members: Sequence[predictor.Predictor | PlainMember], stacks: Stacks, inputs: list[Array]) -> None:
    """All members on one batch, as a worker's executor runs them; `stacks` has them by their places in `members`."""
    for positions, run in stacks.parts(tuple(range(len(members))), len(inputs[0])):
        if run is None:
            members[positions[0]].run(inputs)
        else:
            run(inputs)


def _await(descriptor: int) -> int:
    """The value of a non-blocking eventfd once it has one: polled first, as a wake-up costs as much as a member."""
    patience = time.perf_counter() + POLL_S
    while True:
        try:
            return os.eventfd_read(descriptor)
        except BlockingIOError:
            if time.perf_counter() > patience:
                _block(descriptor)


def _block(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()


def main(arguments: Sequence[str]) -> None:
    """Load, say so, then answer windows until stdin closes."""
    config = msgspec.json.decode(arguments[0], type=ProcessConfig)
    held: list[Process] = []

    def answer(window: ProcessWindow | None) -> ProcessResult | Ready:
        if window is None:
            held.append(Process(config))
            return held[0].ready()
        return held[0].run(window)

    answer_lines(ProcessWindow | None, answer, int(arguments[1]))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1:])
