"""What it costs that a core has slept: a wake-up from another core, and members that run after an idle gap.

`python -m benchmarks.cold`. A server of small members spends most of a single request on this: between two requests
every core of it sleeps, and a core that wakes runs at first from cold caches, in a virtual machine behind a halted
processor. The raw bound never sleeps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import preparation, workloads
from benchmarks.raw_process import run_all
from ensemble_worker import devices, predictor
from ensemble_worker.stacks import Stacks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Workload

GAPS_MS = (0.0, 0.5, 1.0, 2.0)
ROWS = (1, 8, 128)


def wake_up_s(cores: Sequence[int], rounds: int) -> float:
    """Seconds from a write to an eventfd until the process that waits for it has it: half a round trip."""
    there, back = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {cores[-1]})
        for _ in range(rounds):
            os.eventfd_read(there)
            os.eventfd_write(back, 1)
        os._exit(0)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cores[0]})
    started = time.perf_counter()
    for _ in range(rounds):
        os.eventfd_write(there, 1)
        os.eventfd_read(back)
    took_s = time.perf_counter() - started
    os.waitpid(child, 0)
    os.sched_setaffinity(0, before)
    os.close(there)
    os.close(back)
    return took_s / rounds / 2


class Members:
    """All members of a workload on one core, as a worker runs them."""

    def __init__(self, workload: Workload, core: int) -> None:
        predictor.prepare_cpu([core], pin=True)
        device = devices.cpu_device(core, [core], devices.free_memory_bytes())
        specs = (workload.input,), (workload.output,), device, max(ROWS)
        self._members = [predictor.load(workloads.path_of(m), m, *specs) for m in workload.members]
        self._rows = workload.rows()
        with predictor.running_models():
            self._stacks = Stacks(dict(enumerate(self._members)))

    def median_s(self, rows: int, gap_s: float, rounds: int) -> float:
        """The median of the seconds that all members take for a batch, each after so long a sleep."""
        batch = [self._rows[:rows].repeat(-(-rows // len(self._rows)), 0)[:rows]]
        took = []
        with predictor.running_models():
            for _ in range(rounds):
                if gap_s:
                    time.sleep(gap_s)
                started = time.perf_counter()
                run_all(self._members, self._stacks, batch)
                took.append(time.perf_counter() - started)
        return statistics.median(took)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="of each figure (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=workloads.CACHE, help="where models are kept")
    given = parser.parse_args(arguments)
    workload = preparation.prepare("tiny", given.cache)
    cores = sorted(os.sched_getaffinity(0))
    print(f"a wake-up from another core: {1e6 * wake_up_s(cores, 10 * given.rounds):.0f} us\n")
    members = Members(workload, cores[0])
    print(
        "| four tiny members, us | " + " | ".join(f"after {gap:g} ms" if gap else "at once" for gap in GAPS_MS) + " |"
    )
    print("| --- |" + " ---: |" * len(GAPS_MS))
    for rows in ROWS:
        took = [members.median_s(rows, 1e-3 * gap, given.rounds) for gap in GAPS_MS]
        print(f"| {rows} row{'s' if rows > 1 else ''} | " + " | ".join(f"{1e6 * one:,.0f}" for one in took) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
