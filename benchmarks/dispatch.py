"""What the dispatcher itself costs: CPU time for a request and for a batch, without sockets, models or a row store.

`python -m benchmarks.dispatch` prints the best of several rounds for each load, from one row on two devices to a
thousand saturated lanes. The clock that the dispatcher sees is made by hand, so that only its own work is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from heapq import heappop, heappush

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import Batch
from ensemble_gateway.dispatcher import Dispatcher
from ensemble_gateway.queues import Request

TIMEOUT_S = 30.0
TINY_S = 0.000002


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests of so many rows for `members` members, over `lanes` lanes of batches up to `batch_size`.

    `standing` requests wait before the measurement begins, so that every lane is busy. `shared`: every lane runs every
    member, as on CPU devices; otherwise each lane runs one, as on GPUs. A row takes `row_s`.
    """

    name: str
    members: int
    lanes: int
    requests: int
    rows: int = 1
    batch_size: int = 64
    standing: int = 0
    shared: bool = True
    row_s: float = 0.001


LOADS = (
    Load("1 request of 1 row, 2 lanes", 4, 2, 1),
    Load("64 requests of 1 row, 2 lanes", 4, 2, 64),
    Load("1 request of 1 row of tiny members, 2 lanes", 4, 2, 1, row_s=TINY_S),
    Load("64 requests of 1 row of tiny members, 2 lanes", 4, 2, 64, row_s=TINY_S),
    Load("1 request of 128 rows, 2 lanes", 4, 2, 1, rows=128),
    Load("1,000 lanes of 36 tiny members, idle, 64 rows", 36, 1000, 64, row_s=TINY_S),
    Load("1,000 lanes of 36 members, idle, 1 row", 36, 1000, 1),
    Load("1,000 lanes of 36 members, idle, 64 rows", 36, 1000, 64),
    Load("1,000 lanes of 36 members, saturated", 36, 1000, 500, batch_size=8, standing=2000),
    Load("1,000 lanes of 1 of 64 members, idle, 1 row", 64, 1000, 1, shared=False),
    Load("1,000 lanes of 1 of 64 members, saturated", 64, 1000, 500, batch_size=8, standing=1000, shared=False),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds of everything the dispatcher did, by request and by batch, and how many batches there were."""

    name: str
    request_us: float
    batch_us: float
    batches: int


class Bench:
    """A dispatcher with live workers; each lane runs one batch after another, a row takes as long as its load says."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.now = 100.0
        members = [(f"m{index}", "d") for index in range(load.members)]
        self.dispatcher = Dispatcher(members)
        for lane in range(load.lanes):
            hosted = members if load.shared else [members[lane % load.members]]
            live = tuple(
                LiveInstance(index, name, digest, load.batch_size, load.row_s * load.batch_size)
                for index, (name, digest) in enumerate(hosted)
            )
            self.dispatcher.update(State(f"w{lane}", 1, live, load.shared, 2, device_class="cpu"))
        self.slot = 0
        self.flying: list[tuple[float, int, Batch]] = []
        self.free_at: dict[str, float] = {}

    def admit(self, requests: int) -> list[Request]:
        """Admit so many requests, as one turn of the event loop would."""
        wanted = (1 << self.load.members) - 1
        made = []
        for _ in range(requests):
            self.slot += self.load.rows
            ranges = ((self.slot, self.load.rows),)
            made.append(Request(self.load.rows, ranges, wanted, self.load.members, None))
        for request in made:
            self.dispatcher.admit(request, self.now + TIMEOUT_S, self.now)
        return made

    def assign(self) -> int:
        """Give out what can be given out; returns how many batches that made."""
        given = self.dispatcher.assign(self.now)
        self.dispatcher.next_at()
        for batch in given:
            lane = batch.lane.worker
            ends_at = self.free_at[lane] = max(
                self.now, self.free_at.get(lane, 0.0)
            ) + self.load.row_s * batch.rows * len(batch.instances)
            heappush(self.flying, (ends_at, batch.id, batch))
        return len(given)

    def answer(self) -> int:
        """The next batch is answered; returns how many requests that finished."""
        self.now, _, batch = heappop(self.flying)
        taken = self.dispatcher.take(batch.id, self.now)
        if taken is None:
            raise AssertionError("a batch that was given out is known")
        return len(self.dispatcher.settle(taken, [self.load.row_s * batch.rows] * len(batch.instances)))

    def round(self) -> tuple[int, int]:
        """Serve the load's requests once; returns how many requests and batches were done."""
        self.admit(self.load.requests)
        batches = self.assign()
        finished = 0
        while finished < self.load.requests and self.flying:
            finished += self.answer()
            batches += self.assign()
        return finished, batches


def measure(load: Load, rounds: int, cpu_clock: Callable[[], float] = time.process_time) -> Cost:
    """The best of `rounds` measurements of one load."""
    bench = Bench(load)
    if load.standing:
        bench.admit(load.standing)
        bench.assign()
    repeats = max(1, 200 // load.requests) if load.lanes < 100 else 1
    for _ in range(repeats):
        bench.round()
    best: Cost | None = None
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        began = cpu_clock()
        done = [bench.round() for _ in range(repeats)]
        spent_us = (cpu_clock() - began) * 1e6
        gc.enable()
        requests, batches = sum(r for r, _ in done), sum(b for _, b in done)
        if best is None or spent_us / requests < best.request_us:
            best = Cost(load.name, spent_us / requests, spent_us / max(1, batches), batches // repeats)
    if best is None:
        raise ValueError("rounds: at least 1")
    return best


def main() -> None:
    """Measure every load, or those whose name holds the given text, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each load, of which the best counts")
    parser.add_argument("--only", default="", help="loads whose name holds this text")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: {options.rounds} is not above 0")
    if not options.json:
        print(f"{'load':<46}{'us/request':>12}{'us/batch':>10}{'batches':>9}")
    for load in LOADS:
        if options.only not in load.name:
            continue
        cost = measure(load, options.rounds)
        if options.json:
            print(json.dumps(asdict(cost)), flush=True)
        else:
            print(f"{cost.name:<46}{cost.request_us:>12.2f}{cost.batch_us:>10.2f}{cost.batches:>9}", flush=True)


if __name__ == "__main__":
    main()
