"""The described clusters that are shipped, and what a wrong description is told."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_operator.allocation.described import Described, described
from ensemble_operator.allocation.errors import DoesNotFit, InvalidProblem
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import plan
from ensemble_operator.allocation.problem import Problem
from tests.unit.allocation.problems import MIB, misfits

# Searches and programs: seconds of computing, which may be minutes on a machine that is busy.
pytestmark = pytest.mark.timeout(600)

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "planning").glob("*.yaml"))

GOOD: dict[str, Any] = {
    "name": "two",
    "source": "synthetic",
    "batchSizes": [1, 8],
    "devices": [
        {"class": "gpu", "kind": "cuda", "count": 2, "capacityMiB": 1000, "tflops": 5.0, "gbPerS": 500, "launchMs": 2}
    ],
    "members": [{"name": "a", "parametersMillion": 25, "gmacs": 4.0, "activationsMillion": 10}],
    "profiles": [
        {"member": "a", "deviceClass": "gpu", "batchSize": 8, "rowsPerS": 7.0, "latencyS": 1.1, "memoryBytes": 5}
    ],
}


def load(path: Path) -> Described:
    return described(yaml.safe_load(path.read_text()))


def test_five_clusters_are_shipped() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "four-on-1-to-16",
        "heavy-12-on-4",
        "mixed-gpus-and-cpus",
        "one-on-16",
        "thirty-six-on-1-to-16",
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_ours_is_at_least_the_papers_and_near_the_bound(path: Path) -> None:
    problems = load(path).problems
    for label, problem in (problems[0], problems[-1]):
        ours = plan(problem, PlanOptions(max_iterations=2), clock=time.perf_counter)
        paper = plan(problem, PlanOptions(strategy="greedy-paper", max_neighbours=20), clock=time.perf_counter)
        assert misfits(problem, ours.matrix) == [], label
        assert ours.predicted_rows_per_s >= paper.predicted_rows_per_s * (1 - 1e-6), label
        assert ours.gap <= 0.05, label


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_with_default_options_ours_is_at_least_the_papers_everywhere(path: Path) -> None:
    problems = load(path).problems
    # A series takes a minute or two: its ends and its middle stand for it.
    for label, problem in dict((problems[0], problems[len(problems) // 2], problems[-1])).items():
        ours = plan(problem, PlanOptions(), clock=time.perf_counter)
        paper = plan(problem, PlanOptions(strategy="greedy-paper"), clock=time.perf_counter)
        assert misfits(problem, paper.matrix) == [], label
        assert ours.predicted_rows_per_s >= paper.predicted_rows_per_s * (1 - 1e-6), label
        assert max(ours.predicted_rows_per_s, paper.predicted_rows_per_s) <= ours.bound_rows_per_s, label


def shrunk(problem: Problem, mib: int) -> Problem:
    return replace(problem, devices=tuple(replace(d, capacity_bytes=mib * MIB) for d in problem.devices))


def fits(problem: Problem, mib: int) -> bool:
    try:
        plan(shrunk(problem, mib), PlanOptions(max_iterations=0, time_limit_s=60.0), clock=time.perf_counter)
    except DoesNotFit:
        return False
    return True


@pytest.mark.parametrize(("name", "enough"), [("heavy-12-on-4", 8000), ("one-on-16", 4000)])
def test_one_mib_too_little_is_refused_with_the_member_its_need_and_the_largest_free_space(
    name: str, enough: int
) -> None:
    problem = load(next(path for path in EXAMPLES if path.stem == name)).problems[0][1]
    too_small = 0
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        too_small, enough = (too_small, middle) if fits(problem, middle) else (middle, enough)
    with pytest.raises(DoesNotFit, match=r"member '[\w-]+' fits on no device: it needs \d+ MiB .* space is \d+ MiB"):
        plan(shrunk(problem, too_small), PlanOptions(time_limit_s=60.0), clock=time.perf_counter)


def test_where_time_ends_before_it_is_known_the_refusal_says_so() -> None:
    problem = load(next(path for path in EXAMPLES if path.stem == "heavy-12-on-4")).problems[0][1]
    with pytest.raises(DoesNotFit) as refusal:
        plan(shrunk(problem, 6150), PlanOptions(time_limit_s=1e-3), clock=time.perf_counter)
    assert "no placement was found in 0.001 s" in str(refusal.value)
    assert "fits on no device" not in str(refusal.value)


def test_facts_become_profiles_and_measured_ones_win() -> None:
    ((label, problem),) = described(GOOD).problems
    assert label == "2 x gpu"
    assert [d.name for d in problem.devices] == ["gpu-0", "gpu-1"]
    by_size = {p.batch_size: p for p in problem.profiles}
    assert by_size[8].rows_per_s == 7.0
    # 2 ms of launches, 8 GFLOP at 5 TFLOP/s, 100 MB at 500 GB/s.
    assert by_size[1].latency_s == pytest.approx(0.002 + 0.0016 + 0.0002)
    assert by_size[1].rows_per_s == pytest.approx(1 / 0.0038)
    assert by_size[1].memory_bytes == 140_000_000


def test_the_largest_figures_still_make_a_problem() -> None:
    fast = copy.deepcopy(GOOD)
    fast["devices"][0].update(tflops=1e9, gbPerS=1e9, launchMs=0)
    fast["members"][0].update(parametersMillion=1e-6, gmacs=1e-6)
    ((_, problem),) = described(fast).problems
    assert plan(problem, PlanOptions(), clock=time.perf_counter).predicted_rows_per_s > 0


def test_several_counts_are_several_problems() -> None:
    series = copy.deepcopy(GOOD)
    series["devices"][0].pop("count")
    series["devices"][0]["counts"] = [1, 3]
    assert [(label, len(p.devices)) for label, p in described(series).problems] == [("1 x gpu", 1), ("3 x gpu", 3)]


def _without_count(document: dict[str, Any]) -> dict[str, Any]:
    device: dict[str, Any] = document["devices"][0]
    del device["count"]
    return device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], r"document: expected a mapping, got \[\]"),
        (lambda d: d.pop("source"), r"document\.source: missing"),
        (lambda d: d.update(devics=[]), r"document\.devics: unknown field; known are name, source"),
        (lambda d: d.update(members={"a": 1}), r"document\.members: expected a list"),
        (lambda d: d.update(batchSizes=["8"]), r"batchSizes\[0\]: expected a whole number, got '8'"),
        (lambda d: d["devices"].clear(), r"devices: at least one device is needed"),
        (lambda d: d["devices"][0].update(count=True), r"devices\[0\]\.count: expected a whole number, got True"),
        (lambda d: d["devices"][0].update(count=-1), r"counts must not be negative"),
        (lambda d: d["devices"][0].update(count=10**9), r"1 to 100000 devices"),
        (lambda d: d["devices"][0].pop("count"), r"devices\[0\]: exactly one of count and counts"),
        (
            lambda d: d["devices"][0].update(tflops=0),
            r"devices\[0\]\.tflops: must be a finite number above 0 and at most",
        ),
        (lambda d: d["members"][0].update(gmacs=float("nan")), r"members\[0\]\.gmacs: must be a finite number"),
        (lambda d: d["devices"][0].update(launchMs=-1), r"devices\[0\]\.launchMs: must be a finite number from 0"),
        (lambda d: d["devices"][0].update(launchMs=0, tflops=1e300), r"tflops: must be a finite number above 0 and at"),
        (lambda d: d["devices"][0].update(launchMs=0, gbPerS=10**400), r"gbPerS: the number is too large"),
        (
            lambda d: d["devices"][0].update(capacityMiB=10**400),
            r"device 'gpu-0': capacity and overhead must be at most",
        ),
        (lambda d: _without_count(d).update(counts=[]), r"devices\[0\]\.counts: at least one count is needed"),
        (lambda d: d["members"][0].update(activationsMillion=float("nan")), r"activationsMillion: must be a finite"),
        (lambda d: d["members"][0].update(activationsMillion=float("inf")), r"activationsMillion: must be a finite"),
        (lambda d: d["profiles"][0].update(memoryBytes=10**400), r"memory must be at most"),
        (lambda d: d["profiles"][0].update(rowsPerS=1e-320), r"cannot be compared with others: is the unit right\?"),
        (lambda d: d["members"].append(d["members"][0]), r"member 'a' is listed 2 times"),
        (lambda d: d["profiles"][0].pop("memoryBytes"), r"profiles\[0\]\.memoryBytes: missing"),
        (lambda d: d["profiles"][0].update(rowsPerS=-1), r"rows/s must be a finite number above 0, got -1"),
        (lambda d: d["devices"][0].pop("tflops"), r"batch size 1 can be run by no member"),
    ],
)
def test_a_wrong_description_is_told_where(change: Any, message: str) -> None:
    document = copy.deepcopy(GOOD)
    replaced = change(document)
    with pytest.raises(InvalidProblem, match=message):
        described(replaced if replaced == [] else document)
