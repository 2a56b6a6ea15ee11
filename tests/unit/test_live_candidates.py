"""Candidates that are measured: when one answers, when it cannot, what load keeps it full. A fake stage, no process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import pytest

from ensemble_contract.plan import EnsemblePlan, GatewayPlan, ModelSource, ServedMember, WorkerAddress
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.fleet import GatewayState, InstanceReport, MemberState, WorkerReport
from ensemble_operator.load.live import Trials, all_live, failures, load_for, plan_live
from ensemble_operator.serve.observation import Observed
from tests.unit.allocation.problems import misfits, random_problem

X, Y = TensorSpec("x", "FP32", (1000,)), TensorSpec("y", "FP32", (10,))
MATRIX = Matrix(("d0", "d1"), ("a", "b"), [[8, 0], [32, 4]])  # type: ignore[arg-type]


def gateway_of(problem: Problem | None = None, **changes: object) -> GatewayPlan:
    members = [m.name for m in problem.members] if problem else ["a", "b"]
    workers = [d.name for d in problem.devices] if problem else ["d0", "d1"]
    plan = GatewayPlan(
        generation=1,
        ensemble="pair",
        inputs=(X,),
        outputs=(Y,),
        members=tuple(ServedMember(name, name) for name in members),
        workers=tuple(WorkerAddress(name, f"unix:/{name}") for name in workers),
    )
    return msgspec.structs.replace(plan, **changes)


def observed(
    matrix: Matrix = MATRIX,
    generation: int = 1,
    states: Mapping[tuple[str, str], str] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Observed:
    """All of a matrix ready, but for the states and the gateway's counts that are given."""
    workers: dict[str, WorkerReport | None] = {}
    for index, device in enumerate(matrix.devices):
        row = matrix.row(index).items()
        instances = tuple(
            InstanceReport(m, m, size, (states or {}).get((device, m), "ready"), "the cause") for m, size in row
        )
        workers[device] = WorkerReport(generation, instances)
    live = {name: len(matrix.column(at)) for at, name in enumerate(matrix.members)} | dict(counts or {})
    members = tuple(MemberState(name, live=count > 0, instances=count) for name, count in live.items())
    return Observed(GatewayState(generation, True, "http://127.0.0.1:9", members), workers, {})


@pytest.mark.parametrize(
    ("seen", "live"),
    [
        (observed(), True),
        (observed(generation=2), False),
        (observed(states={("d1", "b"): "loading"}), False),
        (observed(counts={"a": 1}), False),
        (observed(Matrix(("d0", "d1"), ("a", "b"), [[8, 0], [16, 4]])), False),  # type: ignore[arg-type]
        (Observed(None, observed().workers, {}), False),
        (Observed(observed().gateway, {**observed().workers, "d0": None}, {}), False),
    ],
    ids=["all", "another generation", "one loads", "the gateway sees fewer", "another size", "no gateway", "no worker"],
)
def test_a_candidate_is_measured_when_all_of_it_answers(seen: Observed, live: bool) -> None:
    assert all_live(MATRIX, 1, seen) is live


def test_what_cannot_answer_is_named() -> None:
    assert list(failures(MATRIX, observed())) == []
    assert list(failures(MATRIX, observed(states={("d1", "b"): "failed"}))) == ["b x4 on d1: the cause"]
    assert list(failures(MATRIX, Observed(None, {}, {"d0": "killed"}))) == ["killed"]


@pytest.mark.parametrize(
    ("changes", "predicted", "clients", "rows", "window_s"),
    [
        # Two batches of a on each device: 2 x (8 + 32) rows.
        ({}, 1000.0, 16, 5, 2.0),
        # 80 rows take 8 s; three times that.
        ({}, 10.0, 16, 5, 24.0),
        ({}, 1.0, 16, 5, 30.0),
        # A quarter of the store, which holds 40 rows of 4,000 bytes.
        ({"max_queue_bytes": 160_000}, 1000.0, 10, 1, 2.0),
    ],
)
def test_the_load_fills_every_batch(
    changes: dict[str, Any], predicted: float, clients: int, rows: int, window_s: float
) -> None:
    load = load_for(MATRIX, gateway_of(**changes), "http://127.0.0.1:8123", predicted, 2.0)
    assert (load.host, load.port, load.model) == ("127.0.0.1", 8123, "pair")
    assert (load.clients, load.rows) == (clients, rows)
    assert load.duration_s == pytest.approx(window_s)


class Broken:
    """A stage on which one member can be loaded nowhere."""

    def __init__(self, problem: Problem, member: str) -> None:
        sources = tuple(ModelSource(m.name, m.name, f"file:///{m.name}", "torch-export") for m in problem.members)
        rows: dict[str, tuple[tuple[int, int], ...]] = {d.name: () for d in problem.devices}
        self.plan = EnsemblePlan(gateway_of(problem), sources, rows)
        self._problem, self._member = problem, member
        self.generations: list[int] = []

    async def push(self, plan: EnsemblePlan) -> None:
        self.plan = plan
        self.generations.append(plan.generation)

    async def observe(self) -> Observed:
        workers = {
            name: WorkerReport(
                self.plan.generation,
                tuple(
                    InstanceReport(s.name, s.digest, size, "failed" if s.name == self._member else "ready", "torn")
                    for s, size in ((self.plan.sources[at], size) for at, size in row)
                ),
            )
            for name, row in self.plan.rows.items()
        }
        return Observed(None, workers, {})


async def test_a_candidate_that_fails_scores_nothing_and_the_search_goes_on() -> None:
    problem = random_problem(2, 2, 3, capacity_mib=9000)
    stage, told = Broken(problem, "m1"), []
    trials = Trials(stage, problem, lambda done, text: told.append((done, text)))
    found = await plan_live(problem, PlanOptions(max_iterations=3), trials)
    assert misfits(problem, found.matrix) == []
    assert stage.generations == list(range(2, 2 + len(trials.scores)))
    assert len(trials.scores) >= 2
    assert all(score.rows_per_s == 0 and "m1 x" in score.failure for _, score in trials.scores)
    assert found.measured_rows_per_s == 0
    assert told[-1][0] == len(trials.scores)


async def test_stopped_before_anything_is_measured_the_plan_is_the_models() -> None:
    problem = random_problem(2, 2, 3, capacity_mib=9000)
    strategies: tuple[Literal["greedy", "greedy-paper"], ...] = ("greedy", "greedy-paper")
    for strategy in strategies:
        trials = Trials(Broken(problem, ""), problem, lambda done, text: None)
        asyncio.get_running_loop().call_later(0.2, trials.stop)
        found = await plan_live(problem, PlanOptions(strategy=strategy), trials)
        assert found.measured_rows_per_s is None
        assert misfits(problem, found.matrix) == []
