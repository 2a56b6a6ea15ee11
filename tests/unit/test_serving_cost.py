"""What serving costs a CPU device: found again from layouts that it has slowed, and put into what plans reckon with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.load.live import Score
from ensemble_operator.load.serving import WINDOWS, windows_of
from ensemble_operator.profiles import serving_cost
from ensemble_operator.profiles.measurements import Device, Measurement, Point
from ensemble_operator.profiles.serving_cost import (
    UNMEASURED,
    KeptCosts,
    Observation,
    ServingCost,
    as_served,
    cost_key,
    cost_of,
    fitted,
    layouts_to_measure,
    with_known_cost,
)

GIB = 1 << 30
X, Y = TensorSpec("x", "FP32", (4,)), TensorSpec("y", "FP32", (2,))
TENSORS = ((X,), (Y,))
MEASURED = {
    ("a", "K"): Measurement(points=(Point(1, 1000.0, 1e-3, 10), Point(64, 20_000.0, 3.2e-3, 99))),
    ("b", "K"): Measurement(points=(Point(1, 500.0, 2e-3, 10), Point(64, 5000.0, 12.8e-3, 99))),
}
DEVICES = tuple(Device(f"cpu-{i}", "cpu", "K", GIB, (i,)) for i in range(2))


def problem_of(measured: dict[tuple[str, str], Measurement], kind: str = "cpu") -> Problem:
    profiles = tuple(
        Profile(member, k, p.batch_size, p.rows_per_s, p.latency_s, p.memory_bytes)
        for (member, k), found in measured.items()
        for p in found.points
    )
    devices = tuple(DeviceSpec(d.name, "K", kind, GIB) for d in DEVICES)  # type: ignore[arg-type]
    return Problem((Member("a"), Member("b")), devices, profiles, (1, 64))


@given(batch_us=st.floats(0, 1000), row_us=st.floats(0, 50))
def test_the_cost_that_slowed_two_layouts_is_found_again(batch_us: float, row_us: float) -> None:
    cost = ServingCost(batch_us * 1e-6, row_us * 1e-6)
    alone = problem_of(MEASURED)
    slowed = problem_of(as_served(MEASURED, cost, {"K"}))
    layouts = layouts_to_measure(alone)
    assert [m.sizes.tolist() for m in layouts] == [[[1, 1], [1, 1]], [[64, 64], [64, 64]]]
    found = fitted(alone, [Observation(matrix, rows_per_s(slowed, matrix)) for matrix in layouts])
    assert found.batch_s == pytest.approx(cost.batch_s, rel=1e-3, abs=1e-9)
    assert found.row_s == pytest.approx(cost.row_s, rel=1e-3, abs=1e-9)


def test_nothing_is_below_zero_and_nothing_comes_from_one_layout() -> None:
    alone = problem_of(MEASURED)
    small, large = layouts_to_measure(alone)
    faster = [Observation(m, 1.5 * rows_per_s(alone, m)) for m in (small, large)]
    assert fitted(alone, faster) == ServingCost(0.0, 0.0)
    assert fitted(alone, [Observation(small, 100.0), Observation(large, 0.0)]) == ServingCost()


def test_what_cannot_tell_is_not_measured() -> None:
    assert layouts_to_measure(problem_of(MEASURED, "cuda")) == ()
    alone = problem_of(MEASURED)
    tight = replace(alone, devices=tuple(replace(d, capacity_bytes=20, overhead_bytes=5) for d in alone.devices))
    assert layouts_to_measure(tight) == ()


def test_medians_count_and_a_large_spread_is_told() -> None:
    alone = problem_of(MEASURED)
    small, large = layouts_to_measure(alone)
    cost = ServingCost(1e-3, 1e-5)
    true = {m: rows_per_s(problem_of(as_served(MEASURED, cost, {"K"})), m) for m in (small, large)}
    found = cost_of(alone, {m: [0.5 * rate, rate, 1.1 * rate] for m, rate in true.items()})
    assert found.batch_s == pytest.approx(1e-3, rel=1e-3)
    assert found.row_s == pytest.approx(1e-5, rel=1e-2)
    assert found.spread == pytest.approx(0.6)


def test_layouts_take_turns_and_one_that_fails_ends_it() -> None:
    layouts = layouts_to_measure(problem_of(MEASURED))
    asked: list[Matrix] = []

    def answering(failures: dict[int, str]) -> Callable[[Matrix], Awaitable[Score]]:
        async def measure(matrix: Matrix) -> Score:
            asked.append(matrix)
            failure = failures.get(len(asked), "")
            return Score(0.0 if failure else float(len(asked)), 1.0, failure)

        return measure

    windows, failure = asyncio.run(windows_of(answering({}), layouts))
    assert (asked, failure) == ([*layouts] * WINDOWS, "")
    assert windows == {layouts[0]: [1.0, 3.0, 5.0], layouts[1]: [2.0, 4.0, 6.0]}
    asked.clear()
    assert asyncio.run(windows_of(answering({2: "out of memory"}), layouts))[1] == "out of memory"
    assert len(asked) == 2


def test_other_libraries_are_another_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cost_key(TENSORS, 2, DEVICES)
    assert cost_key(TENSORS, 2, DEVICES) == before
    monkeypatch.setattr(serving_cost, "execution_versions", lambda: "torch 99")
    assert cost_key(TENSORS, 2, DEVICES) != before


def test_what_is_known_is_reckoned_with_on_cpus_only(tmp_path: Path) -> None:
    KeptCosts(tmp_path).write(cost_key(TENSORS, 2, DEVICES), ServingCost(1e-3, 0.0))
    both = {**MEASURED, ("a", "G"): MEASURED["a", "K"]}
    served = with_known_cost(MEASURED, DEVICES, TENSORS, tmp_path)
    # 1 ms alone and 1 ms more.
    assert served["a", "K"].points[0] == Point(1, pytest.approx(500.0), pytest.approx(2e-3), 10)  # type: ignore[arg-type]
    assert as_served(both, ServingCost(1e-3), {"K"})["a", "G"] == MEASURED["a", "K"]
    unmeasured = as_served(MEASURED, UNMEASURED, {"K"})
    assert unmeasured["a", "K"].points[0].latency_s == pytest.approx(1.1e-3)
    assert with_known_cost(MEASURED, DEVICES[:1], TENSORS, tmp_path) == unmeasured
    (tmp_path / "serving" / f"{cost_key(TENSORS, 2, DEVICES)}.json").write_text("{")
    assert with_known_cost(MEASURED, DEVICES, TENSORS, tmp_path) == unmeasured
