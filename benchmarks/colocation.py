"""One process for all members of a device, or one process for each: same cores (or GPU), same load, no server.

Two loads. **One at a time**: a batch goes through all members before the next is given out, as for one client.
**Stream**: a fixed number of batches goes through every member, as fast as each process can; the time is that of the
slowest process, and those that are done leave it their cores. On CPU all processes may use all cores of the device: one
process runs its members in turn, processes of one member run side by side; each with one thread, and with as many as
there are cores. On a GPU the one process has a stream and a thread for each member.

`python -m benchmarks.colocation` prints a table, the memory of each way included, and what it settles: whether a worker
that runs all members of its device in one process loses anything by that. The default device is one core, as `ensemble
serve` divides a small machine. Run it where nothing else runs: beside other load, more processes get more of the cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from benchmarks import preparation, workloads
from benchmarks.children import START_TIMEOUT_S, Child, ChildFailed
from benchmarks.raw_process import ProcessConfig, ProcessResult, ProcessWindow, Ready
from ensemble_worker import devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Workload

BATCHES = (1, 8, 64)
WINDOW_TIMEOUT_S = 300.0
ONE, EACH = "one process", "a process each"
# Medians that differ by less are the same.
A_TIE = 0.05


class Way(msgspec.Struct, frozen=True):
    """Which members each process holds, and its torch threads on CPU."""

    name: str
    members: tuple[tuple[int, ...], ...]
    threads: int


class Measured(msgspec.Struct, frozen=True):
    """Rows/s that passed all members, per window."""

    workload: str
    way: str
    batch: int
    one_at_a_time: tuple[float, ...]
    stream: tuple[float, ...]
    memory_bytes: int


def ways(members: int, cores: int, device: str) -> list[Way]:
    """One process for all members, and a process for each; on CPU with one thread and with one for every core."""
    together, apart = (tuple(range(members)),), tuple((m,) for m in range(members))
    if device != "cpu":
        return [Way(ONE, together, 1), Way(EACH, apart, 1)]
    return [
        Way(f"{name}, {threads} thread{'s' * (threads > 1)}", held, threads)
        for name, held in ((ONE, together), (EACH, apart))
        for threads in sorted({1, cores})
    ]


class Running:
    """The processes of one way, loaded."""

    def __init__(self, workload: Workload, way: Way, device: str, cores: tuple[int, ...], undo: ExitStack) -> None:
        self.way = way
        pairs = []
        for _ in way.members[1:]:
            pair = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
            pairs.append(pair)
            for descriptor in pair:
                undo.callback(os.close, descriptor)
        descriptors = [descriptor for pair in pairs for descriptor in pair]
        self._children = []
        for index, held in enumerate(way.members):
            config = ProcessConfig(
                folder=workload.folder,
                members=held,
                cores=cores,
                threads=way.threads,
                max_batch=max(BATCHES),
                device=device,
                others=() if index else tuple(pairs),
                pair=pairs[index - 1] if index else None,
            )
            arguments = [msgspec.json.encode(config).decode(), str(os.getpid())]
            log = Path(workload.folder) / "logs" / f"colocation-{way.name.replace(' ', '-')}-{index}.log"
            child = Child("benchmarks.raw_process", arguments, log, descriptors)
            undo.callback(child.stop)
            child.tell(None)
            self._children.append(child)
        for child in self._children:
            child.hear(Ready, START_TIMEOUT_S)

    def one_at_a_time(self, batch: int, window_s: float) -> float:
        """Rows/s when a batch waits for the one before."""
        first = self._run(ProcessWindow(batch, batch, window_s, in_step=True))[0]
        return first.rounds * batch / first.wall_s

    def stream(self, batch: int, rounds: int) -> float:
        """Rows/s until the slowest process has done all rounds."""
        results = self._run(ProcessWindow(batch, batch, 0.0, in_step=False, rounds=rounds))
        return rounds * batch / max(result.wall_s for result in results)

    def memory_bytes(self) -> int:
        """Memory of all processes, shared pages divided among those that share them (PSS); a GPU's is not in it."""
        return sum(psutil.Process(child.pid).memory_full_info().pss for child in self._children)

    def _run(self, window: ProcessWindow) -> list[ProcessResult]:
        for child in self._children:
            child.tell(window)
        return [child.hear(ProcessResult, WINDOW_TIMEOUT_S) for child in self._children]


def measure(workload: Workload, device: str, cores: tuple[int, ...], windows: int, window_s: float) -> list[Measured]:
    """All ways, interleaved, for each batch size."""
    found = []
    with ExitStack() as undo:
        running = [
            Running(workload, way, device, cores, undo) for way in ways(len(workload.members), len(cores), device)
        ]
        for batch in BATCHES:
            rounds = max(1, round(running[0].one_at_a_time(batch, window_s) * window_s / batch))
            rates: list[tuple[list[float], list[float]]] = [([], []) for _ in running]
            for turn in range(windows):
                for step in range(len(running)):
                    at = (turn + step) % len(running)
                    rates[at][0].append(running[at].one_at_a_time(batch, window_s))
                    rates[at][1].append(running[at].stream(batch, rounds))
            for one, (in_turn, stream) in zip(running, rates, strict=True):
                found.append(
                    Measured(workload.name, one.way.name, batch, tuple(in_turn), tuple(stream), one.memory_bytes())
                )
    return found


def table(measured: Sequence[Measured]) -> str:
    """Medians as a Markdown table; ratios are to one process for all members."""
    lines = [
        "| workload | batch | processes | one at a time, rows/s | | stream, rows/s | | memory MiB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = {(m.workload, m.batch): m for m in reversed(measured)}
    for one in measured:
        together = base[one.workload, one.batch]
        figures = []
        for rates, reference in ((one.one_at_a_time, together.one_at_a_time), (one.stream, together.stream)):
            figures.append(
                f"{statistics.median(rates):,.0f} | {statistics.median(rates) / statistics.median(reference):.2f}"
            )
        lines.append(
            f"| {one.workload} | {one.batch} | {one.way} | {' | '.join(figures)} | {one.memory_bytes / 2**20:,.0f} |"
        )
    return "\n".join(lines)


def verdict(measured: Sequence[Measured]) -> str:
    """What the measurements settle: the better number of threads of one process against that of a process each."""
    cells = dict.fromkeys((m.workload, m.batch) for m in measured)
    ratios: dict[str, list[float]] = {"one at a time": [], "stream": []}
    memory = []
    for workload, batch in cells:
        here = [m for m in measured if (m.workload, m.batch) == (workload, batch)]
        one, each = ([m for m in here if m.way.startswith(name)] for name in (ONE, EACH))
        for load, rates_of in (("one at a time", _one_at_a_time), ("stream", _stream)):
            best_one, best_each = (max(statistics.median(rates_of(m)) for m in ways) for ways in (one, each))
            ratios[load].append(best_one / best_each)
        memory.append(min(m.memory_bytes for m in one) / min(m.memory_bytes for m in each))
    spans = ", ".join(
        f"{statistics.median(found):.2f} times the rows/s {load} ({min(found):.2f} to {max(found):.2f})"
        for load, found in ratios.items()
    )
    worst = min(statistics.median(found) for found in ratios.values())
    settled = "as fast or faster" if worst >= 1 - A_TIE else "SLOWER: a process each should be reconsidered"
    return (
        f"One process for all members against a process each: {spans}, in {statistics.median(memory):.2f} of the "
        f"memory. One process is {settled}."
    )


def _one_at_a_time(one: Measured) -> tuple[float, ...]:
    return one.one_at_a_time


def _stream(one: Measured) -> tuple[float, ...]:
    return one.stream


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. 0, or 1 if a process failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colocation", description=__doc__)
    parser.add_argument(
        "--workloads", default="tiny,cnn", help=f"of {', '.join(workloads.NAMES)} (default: %(default)s)"
    )
    parser.add_argument("--device", default="", help="cpu or cuda-N (default: the first GPU, else cpu)")
    parser.add_argument("--cores", type=int, default=1, help="cores of the CPU device (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=5, help="windows a way and batch size (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=1.0, help="seconds a window (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=workloads.CACHE, help="where models are kept (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    first = devices.discover()[0]
    device = given.device or (first.name if first.kind == "cuda" else "cpu")
    cores = tuple(sorted(os.sched_getaffinity(0)))[: max(1, given.cores)]
    measured: list[Measured] = []
    try:
        for name in given.workloads.split(","):
            workload = preparation.prepare(name, given.cache)
            measured += measure(workload, device, cores, given.windows, given.window_s)
    except (ChildFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"device {device}" + (f", {len(cores)} cores" if device == "cpu" else "") + "\n\n" + table(measured))
    print("\n" + verdict(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
