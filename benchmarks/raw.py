"""The raw bound: the members of a workload executed as a worker executes them, with no server at all.

Definition. A **layout** is P processes of T threads, P·T at most the cores; either each process holds all members, or
the members are divided over the processes (longest first, by measured time). R rows are in flight. A process that
holds all members takes 1/P of the R rows through all of them; with divided members each process takes all R rows
through its own. It does so in batches of B rows, with its input at hand, through `ensemble_worker.predictor` as a
worker does (members that it would stack are stacked), and drops the results: nothing is received, copied, combined or
sent. The **plain** bound is the same with members as `torch.export.load` gives them, one after the other.

* With **one client** the next request comes after the answer to the last: a round is given out by the first process
  and is over when all have finished (an eventfd each way; for up to 50 µs the waiting side polls it, then it blocks).
* With **more clients** there is always work: processes run free, each on its share; the rate is the sum over processes
  that hold all members, and the least of those that share them out, as every row must pass every member.

The bound of a load is the best over layouts and batch sizes: all are tried in short windows, then the best few are
measured again in the interleaved windows of the run, and the highest median counts. Processes are started once a
layout, warm, and blocked on a pipe while others are measured; those that are the best for no load end before that.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from benchmarks.children import START_TIMEOUT_S, Child
from benchmarks.raw_process import ProcessConfig, ProcessResult, ProcessWindow, Ready

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from benchmarks.loads import Load
    from benchmarks.workloads import Workload

CALIBRATION_S = 0.3
WINDOW_TIMEOUT_S = 300.0
# Settings this close to the best in calibration are measured again beside it.
FINALIST_SHARE = 0.95
FINALISTS = 2
# Up to this many rows a round, a second batch size is tried in step; longer rounds follow the free-running rates
# closely.
SHORT_ROUND_ROWS = 128


class Layout(NamedTuple):
    """Processes of some threads each, that hold all members or share them out."""

    processes: int
    threads: int
    divided: bool = False

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}{' divided' if self.divided else ''}"


class Setting(NamedTuple):
    """A layout and its batch size in rows."""

    layout: Layout
    batch: int

    def __str__(self) -> str:
        return f"{self.layout} batch {self.batch}"


def layouts(cores: int, members: int) -> list[Layout]:
    """The layouts to try: 1, 2, 4, … up to all cores as processes, each with one thread or its share of the cores."""
    counts = sorted({1, *(1 << k for k in range(cores.bit_length()) if 1 << k <= cores), cores})
    found = []
    for processes in counts:
        for threads in sorted({1, cores // processes}):
            found.append(Layout(processes, threads))
            if 1 < processes <= members:
                found.append(Layout(processes, threads, divided=True))
    return found


def divide(member_s: Sequence[float], parts: int) -> list[tuple[int, ...]]:
    """Members over processes so that the longest sum is short: longest first, to the least loaded (Graham's LPT)."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    for member in sorted(range(len(member_s)), key=lambda m: -member_s[m]):
        min(shares, key=lambda share: sum(member_s[m] for m in share)).append(member)
    return [tuple(sorted(share)) for share in shares]


def shares_of(rows: int, layout: Layout) -> list[int]:
    """Rows of a round for each process of a layout: all of them where members are divided."""
    if layout.divided:
        return [rows] * layout.processes
    return [rows // layout.processes + (p < rows % layout.processes) for p in range(layout.processes)]


class Group:
    """The processes of one layout."""

    def __init__(
        self, workload: Workload, layout: Layout, members: Sequence[tuple[int, ...]], cores: Sequence[int], logs: Path,
        *, plain: bool = False,
    ) -> None:  # fmt: skip
        self.layout = layout
        self._children: list[Child] = []
        self._fds: list[int] = []
        pairs = [(self._eventfd(), self._eventfd()) for _ in members[1:]]
        for index, held in enumerate(members):
            start = index * layout.threads
            config = ProcessConfig(
                folder=workload.folder,
                members=held,
                cores=tuple(cores[start : start + layout.threads]),
                threads=layout.threads,
                max_batch=max(workload.batch_sizes),
                plain=plain,
                others=() if index else tuple(pairs),
                pair=pairs[index - 1] if index else None,
            )
            arguments = [msgspec.json.encode(config).decode(), str(os.getpid())]
            log = logs / f"raw-{'plain-' if plain else ''}{str(layout).replace(' ', '-')}-{index}.log"
            self._children.append(Child("benchmarks.raw_process", arguments, log, self._fds))
        for child in self._children:
            child.tell(None)

    def ready(self) -> list[Ready]:
        """Await that all processes have loaded and checked their members."""
        return [child.hear(Ready, START_TIMEOUT_S) for child in self._children]

    def rows_per_s(self, rows: int, batch: int, window_s: float, *, in_step: bool) -> float:
        """The rate of the layout with `rows` rows in flight; `raw` says how it is counted."""
        shares = shares_of(rows, self.layout)
        results = self._run([ProcessWindow(share, batch, window_s, in_step) for share in shares])
        if in_step:
            return results[0].rounds * rows / results[0].wall_s
        rates = [result.rounds * share / result.wall_s for result, share in zip(results, shares, strict=True)]
        return min(rates) if self.layout.divided else sum(rates)

    def stop(self) -> None:
        """End the processes."""
        for child in self._children:
            child.stop()
        for descriptor in self._fds:
            os.close(descriptor)

    def _run(self, windows: Iterable[ProcessWindow]) -> list[ProcessResult]:
        for child, window in zip(self._children, windows, strict=True):
            child.tell(window)
        return [child.hear(ProcessResult, WINDOW_TIMEOUT_S) for child in self._children]

    def _eventfd(self) -> int:
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._fds.append(descriptor)
        return descriptor


class RawBound:
    """The best layouts of a workload on these cores, started and warm; `plain`: with members as PyTorch loads them.

    `finalists` has the best settings for each load, best first, by short windows.
    """

    def __init__(
        self, workload: Workload, asked: Iterable[Load], cores: Sequence[int], logs: Path, *, plain: bool
    ) -> None:
        self._workload = workload
        self._groups: dict[Layout, Group] = {}
        everything = tuple(range(len(workload.members)))
        with ExitStack() as undo:
            undo.callback(self.stop)
            member_s: tuple[float, ...] = ()
            for layout in layouts(len(cores), len(everything)):
                parts = divide(member_s, layout.processes) if layout.divided else [everything] * layout.processes
                group = self._groups[layout] = Group(workload, layout, parts, cores, logs, plain=plain)
                ready = group.ready()
                member_s = member_s or ready[0].member_s
            self._free: dict[Setting, float] = {}
            self.finalists = {load: self._best_settings(load) for load in asked}
            wanted = {setting.layout for settings in self.finalists.values() for setting in settings}
            for layout in self._groups.keys() - wanted:
                self._groups.pop(layout).stop()
            undo.pop_all()

    def rows_per_s(self, setting: Setting, load: Load, window_s: float) -> float:
        """One window of a load."""
        group = self._groups[setting.layout]
        return group.rows_per_s(load.rows_in_flight, setting.batch, window_s, in_step=load.connections == 1)

    def stop(self) -> None:
        """End all processes."""
        for group in self._groups.values():
            group.stop()

    def _best_settings(self, load: Load) -> list[Setting]:
        rates = {}
        for layout, group in self._groups.items():
            most = min(shares_of(load.rows_in_flight, layout))
            sizes = [b for b in self._workload.batch_sizes if b <= most]
            if not sizes:
                continue
            ranked = sorted(sizes, key=lambda b, of=layout: -self._free_rate(Setting(of, b)))  # type: ignore[misc]
            if load.connections > 1:
                rates[Setting(layout, ranked[0])] = self._free_rate(Setting(layout, ranked[0]))
                continue
            for batch in ranked[: 2 if load.rows <= SHORT_ROUND_ROWS else 1]:
                rates[Setting(layout, batch)] = group.rows_per_s(load.rows, batch, CALIBRATION_S, in_step=True)
        best = sorted(rates, key=lambda setting: -rates[setting])
        return [s for s in best if rates[s] >= FINALIST_SHARE * rates[best[0]]][:FINALISTS]

    def _free_rate(self, setting: Setting) -> float:
        if setting not in self._free:
            group = self._groups[setting.layout]
            rows = setting.batch * (1 if setting.layout.divided else setting.layout.processes)
            self._free[setting] = group.rows_per_s(rows, setting.batch, CALIBRATION_S, in_step=False)
        return self._free[setting]
