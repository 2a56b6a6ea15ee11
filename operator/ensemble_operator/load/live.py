"""`evaluate: live`: candidate matrices measured, one after the other, through a gateway and workers that run.

The processes are started once; each candidate is pushed to them as a plan, and put under a load that keeps all its
batches full. A candidate that does not come to answer scores 0, as one that does not fit.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from ensemble_contract.plan import EnsemblePlan, GatewayPlan
from ensemble_operator.allocation.greedy import SearchStopped
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import Plan, plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.errors import EnsembleError
from ensemble_operator.load.loads import Load, Progress
from ensemble_operator.load.running import run
from ensemble_operator.plans import ensemble_plan
from ensemble_operator.serve.observation import Observed

# A worker is granted two batches of each instance: one that runs and one that waits.
BATCHES_UNDER_WAY = 2
# Enough that answers come evenly, few enough that the generator takes little from the devices.
CLIENTS = 16
# Fewer would wait for each other's round trips, whatever the matrix.
LEAST_UNDER_WAY = 64
# Of the row store, which holds outputs and answers besides the rows.
SHARE_OF_STORE = 0.25
LEAST_WINDOW_S, LONGEST_WINDOW_S = 2.0, 30.0
# A window is at least as long as all rows under way take so many times.
TURNOVERS = 3.0
SETTLE_S, LOOK_S = 120.0, 0.05


class Stage(Protocol):
    """A gateway and workers that run, and can be given another plan."""

    plan: EnsemblePlan

    async def push(self, plan: EnsemblePlan) -> None:
        """Have every process take a newer plan with the same workers."""

    async def observe(self) -> Observed:
        """Ask every process how it is."""


class CandidateFails(EnsembleError):
    """A candidate does not come to answer; the message names the member, the device and the cause."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a candidate came to. `predicted_rows_per_s` is the model's; `failure` says why it scores 0."""

    rows_per_s: float
    predicted_rows_per_s: float
    failure: str = ""


class Trials:
    """Measures one matrix after the other on a stage; `told` is given a line about what goes on.

    `window_s` is the least time that answers of a candidate are counted.
    """

    def __init__(
        self,
        stage: Stage,
        problem: Problem,
        told: Callable[[int, str], None],
        window_s: float = LEAST_WINDOW_S,
    ) -> None:
        self._stage, self._problem, self._told, self._window_s = stage, problem, told, window_s
        self._loop = asyncio.get_running_loop()
        self._running: concurrent.futures.Future[Score] | None = None
        self._stopped = threading.Event()
        self.scores: list[tuple[Matrix, Score]] = []

    @property
    def best_rows_per_s(self) -> float:
        """The most that was measured so far."""
        return max((score.rows_per_s for _, score in self.scores), default=0.0)

    def stop(self) -> None:
        """Measure no more: the candidate under way is left, and the search ends with the best so far."""
        self._stopped.set()
        if self._running is not None:
            self._running.cancel()

    def evaluate(self, matrix: Matrix) -> float:
        """The rows/s of a matrix, for a search in another thread.

        Raises SearchStopped once `stop` was called, and what the stage raises.
        """
        if self._stopped.is_set():
            raise SearchStopped
        self._running = asyncio.run_coroutine_threadsafe(self.measure(matrix), self._loop)
        # Stopped between the two, by the loop's own thread.
        if self._stopped.is_set():
            self._running.cancel()
        try:
            return self._running.result().rows_per_s
        except concurrent.futures.CancelledError:
            raise SearchStopped from None

    async def measure(self, matrix: Matrix) -> Score:
        """Push a matrix, wait until all of it answers, and put it under load.

        Raises what the stage raises when its processes cannot go on.
        """
        predicted = rows_per_s(self._problem, matrix)
        try:
            url = await self._placed(matrix)
            load = load_for(matrix, self._stage.plan.gateway, url, predicted, self._window_s)
            found = await run(load, self._progress)
            failure = found.refused or ("answers lack members" if found.partial else "")
            score = Score(0.0 if failure else found.rows_per_s, predicted, failure)
        except CandidateFails as error:
            score = Score(0.0, predicted, str(error))
        self.scores.append((matrix, score))
        said = score.failure or f"{score.rows_per_s:,.0f} rows/s"
        self._told(len(self.scores), f"candidate {len(self.scores)}: {said}, best {self.best_rows_per_s:,.0f} rows/s")
        return score

    async def _placed(self, matrix: Matrix) -> str:
        """Push the matrix; the gateway's URL when every instance answers.

        Raises CandidateFails.
        """
        former = self._stage.plan
        gateway = msgspec.structs.replace(former.gateway, generation=former.generation + 1)
        sources = {source.name: source for source in former.sources}
        await self._stage.push(ensemble_plan(gateway, matrix, sources, former.row_cache_bytes))
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            observed = await self._stage.observe()
            for cause in failures(matrix, observed):
                raise CandidateFails(cause)
            if observed.gateway is not None and all_live(matrix, gateway.generation, observed):
                return observed.gateway.url
            await asyncio.sleep(LOOK_S)
        raise CandidateFails(f"not every instance answers after {SETTLE_S:g} s")

    def _progress(self, progress: Progress) -> None:
        best = f", best so far {self.best_rows_per_s:,.0f} rows/s" if self.scores else ""
        text = f"candidate {len(self.scores) + 1}: {progress.rows_per_s:,.0f} rows/s now{best}"
        self._told(len(self.scores), text)


async def plan_live(problem: Problem, options: PlanOptions, trials: Trials) -> Plan:
    """Plan with every candidate measured; the search runs in a thread beside this loop.

    Cancelled, it waits for the search to end. Raises as `plan` does, and what the stage of the trials raises.
    """
    searching = asyncio.ensure_future(
        asyncio.to_thread(plan, problem, options, evaluate=trials.evaluate, clock=time.monotonic)
    )
    try:
        return await asyncio.shield(searching)
    finally:
        if not searching.done():
            trials.stop()
            await asyncio.wait([searching])


def load_for(matrix: Matrix, gateway: GatewayPlan, url: str, predicted_rows_per_s: float, window_s: float) -> Load:
    """A closed loop with enough rows under way to keep every batch of the matrix full, as far as the store allows.

    The window lasts as long as these rows take a few times; the warm-up as long as they take once.
    """
    row_bytes = sum(spec.row_bytes for spec in gateway.inputs)
    fullest = int(matrix.sizes.sum(axis=0).max())
    stored = int(SHARE_OF_STORE * gateway.max_queue_bytes // max(1, row_bytes))
    under_way = max(1, min(max(LEAST_UNDER_WAY, BATCHES_UNDER_WAY * fullest), stored))
    clients = min(CLIENTS, under_way)
    turnover_s = under_way / predicted_rows_per_s if predicted_rows_per_s > 0 else LONGEST_WINDOW_S
    address = urlsplit(url)
    return Load(
        host=address.hostname or "",
        port=address.port or 80,
        model=gateway.ensemble,
        inputs=gateway.inputs,
        clients=clients,
        rows=math.ceil(under_way / clients),
        duration_s=max(window_s, min(TURNOVERS * turnover_s, LONGEST_WINDOW_S)),
        warmup_s=max(window_s / 4, min(turnover_s, LONGEST_WINDOW_S)),
        timeout_s=max(gateway.timeout_s, 2 * LONGEST_WINDOW_S),
    )


def failures(matrix: Matrix, observed: Observed) -> Iterable[str]:
    """Why instances of the matrix do not run."""
    for index, worker in enumerate(matrix.devices):
        if worker in observed.given_up:
            yield observed.given_up[worker]
        report = observed.workers.get(worker)
        wanted = set(matrix.row(index).items())
        for instance in report.instances if report else ():
            if instance.state == "failed" and (instance.member, instance.batch_size) in wanted:
                yield f"{instance.member} x{instance.batch_size} on {worker}: {instance.error or 'failed'}"


def all_live(matrix: Matrix, generation: int, observed: Observed) -> bool:
    """Whether every worker runs its row of this generation, and the gateway sees all of it."""
    gateway = observed.gateway
    if gateway is None or gateway.generation != generation:
        return False
    for index, worker in enumerate(matrix.devices):
        report = observed.workers.get(worker)
        if report is None or report.generation != generation:
            return False
        ready = {(i.member, i.batch_size) for i in report.instances if i.state == "ready"}
        if ready != set(matrix.row(index).items()):
            return False
    counts = {name: len(matrix.column(at)) for at, name in enumerate(matrix.members)}
    return all(member.instances == counts.get(member.name, 0) for member in gateway.members)
