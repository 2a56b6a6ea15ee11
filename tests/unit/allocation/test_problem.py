"""What a problem refuses, and the plain rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings

from ensemble_operator.allocation.errors import DoesNotFit, InvalidProblem
from ensemble_operator.allocation.matrix import Cell, Matrix
from ensemble_operator.allocation.memory import faults, fits, free_bytes, is_feasible
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.allocation.worstfit import fill, preferred_batch_size, worst_fit
from tests.unit.allocation.problems import MIB, misfits, problems, random_problem

GPU = DeviceSpec("gpu-0", "gpu", "cuda", 1000 * MIB)
CPU = DeviceSpec("cpu-0", "cpu", "cpu", 4000 * MIB)


def profile(member: str, size: int, memory_mib: int, rate: float = 100.0, device_class: str = "gpu") -> Profile:
    return Profile(member, device_class, size, rate, size / rate, memory_mib * MIB)


def problem(**changes: object) -> Problem:
    fields: dict[str, object] = {
        "members": (Member("a"), Member("b")),
        "devices": (GPU,),
        "profiles": (profile("a", 1, 100), profile("b", 1, 200)),
        "batch_sizes": (1,),
        "headroom": 0.0,
    }
    return Problem(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ()}, "at least one member"),
        ({"members": (Member("a"), Member("a"))}, "member 'a' is listed 2 times"),
        ({"devices": ()}, "at least one device"),
        ({"devices": (GPU, GPU)}, "device 'gpu-0' is listed 2 times"),
        ({"devices": (GPU, CPU)}, "device class 'cpu' has no profile of any member; there are profiles for ['gpu']"),
        ({"devices": (GPU, replace(GPU, name="x", kind="cpu"))}, "is of kind cpu and of kind cuda"),
        ({"devices": (replace(GPU, capacity_bytes=0),)}, "device 'gpu-0': capacity must be above 0 bytes, got 0"),
        ({"devices": (replace(GPU, overhead_bytes=-1),)}, "overhead must be at least 0"),
        ({"devices": (replace(GPU, capacity_bytes=10**5000),)}, "capacity and overhead must be at most"),
        ({"devices": (DeviceSpec("x", "gpu", "tpu", 1),)}, "kind 'tpu' is neither cpu nor cuda"),  # type: ignore[arg-type]
        ({"batch_sizes": ()}, "at least one is needed"),
        ({"batch_sizes": (1, 1)}, "batch size 1 is listed 2 times"),
        ({"batch_sizes": (1, 0)}, "batch size 0 is not in 1..65536"),
        ({"batch_sizes": (1, 7)}, "batch size 7 can be run by no member"),
        ({"headroom": 1.0}, "headroom 1.0 is not in [0, 1)"),
        ({"headroom": math.nan}, "headroom nan"),
        ({"colocation": {"gpu": 0.0}}, "co-location factor 0.0 of class 'gpu'"),
        ({"profiles": (profile("a", 1, 1),)}, "member 'b' has no profile"),
        ({"profiles": (profile("a", 1, 1), profile("a", 1, 2), profile("b", 1, 1))}, "is listed 2 times"),
        ({"profiles": (profile("a", 1, 1, math.nan), profile("b", 1, 1))}, "profile of 'a' on 'gpu' at batch size 1"),
        ({"profiles": (profile("a", 1, 1, -5.0), profile("b", 1, 1))}, "got -5.0"),
        ({"profiles": (profile("a", 1, -1), profile("b", 1, 1))}, "memory must be at least 0"),
        ({"profiles": (replace(profile("a", 1, 1), latency_s=math.inf), profile("b", 1, 1))}, "latency"),
    ],
)
def test_a_contradictory_problem_is_refused_and_the_fault_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidProblem) as refusal:
        problem(**changes)
    assert message in str(refusal.value)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InvalidProblem) as refusal:
        Problem((), (), (), ())
    assert len(refusal.value.faults) == 3


def test_options_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(InvalidProblem, match=r"target throughput above 0.*max neighbours"):
        PlanOptions(objective="devices", max_neighbours=0)
    with pytest.raises(InvalidProblem, match="seed -1 must be at least 0"):
        PlanOptions(seed=-1)
    with pytest.raises(InvalidProblem, match="strategy"):
        PlanOptions(strategy="guess")  # type: ignore[arg-type]


def test_a_matrix_is_a_value() -> None:
    wanted = problem()
    empty = Matrix.empty(wanted)
    placed = empty.with_cell(0, 1, 1)
    assert list(placed.cells()) == [Cell("gpu-0", "b", 1)]
    assert (placed.row(0), placed.column(1), placed.column(0)) == ({"b": 1}, {"gpu-0": 1}, {})
    assert empty.instance_count == 0
    assert placed == Matrix.of(wanted, [[0, 1]])
    assert hash(placed) == hash(Matrix.of(wanted, [[0, 1]]))
    assert placed != empty
    with pytest.raises(ValueError, match="read-only"):
        placed.sizes[0, 0] = 1
    with pytest.raises(ValueError, match="below 0"):
        placed.with_cell(0, 0, -1)


def test_memory_is_capacity_less_headroom_and_overhead() -> None:
    wanted = problem(devices=(replace(GPU, overhead_bytes=50 * MIB),), headroom=0.1)
    matrix = Matrix.of(wanted, [[1, 1]])
    assert free_bytes(wanted, matrix).tolist() == [(900 - 50 - 300) * MIB]
    assert is_feasible(wanted, matrix)
    assert faults(wanted, Matrix.of(wanted, [[1, 0]])) == ("member 'b' has no instance",)
    tight = problem(devices=(replace(GPU, capacity_bytes=299 * MIB),))
    assert not fits(tight, Matrix.of(tight, [[1, 1]]))
    assert faults(tight, Matrix.of(tight, [[1, 1]])) == ("device 'gpu-0' holds 1 MiB too much",)


def test_one_mib_too_little_names_the_member_its_need_and_the_largest_free_space() -> None:
    exactly = problem(devices=(replace(GPU, capacity_bytes=300 * MIB),))
    assert worst_fit(exactly).sizes.tolist() == [[1, 1]]
    too_little = problem(devices=(replace(GPU, capacity_bytes=299 * MIB),))
    with pytest.raises(DoesNotFit) as refusal:
        worst_fit(too_little)
    assert "member 'a' fits on no device: it needs 100 MiB at batch size 1" in str(refusal.value)
    assert "largest free space is 99 MiB, on device 'gpu-0'" in str(refusal.value)


def test_worst_fit_spreads_and_takes_cpus_last() -> None:
    both = tuple(profile(m, 1, mib, device_class=c) for m, mib in (("a", 400), ("b", 500)) for c in ("gpu", "cpu"))
    one_gpu = problem(devices=(CPU, GPU), profiles=both)
    assert worst_fit(one_gpu).sizes.tolist() == [[0, 0], [1, 1]]
    small_gpu = problem(devices=(CPU, replace(GPU, capacity_bytes=600 * MIB)), profiles=both)
    assert worst_fit(small_gpu).sizes.tolist() == [[1, 0], [0, 1]]
    two_gpus = problem(devices=(GPU, replace(GPU, name="gpu-1")))
    assert worst_fit(two_gpus).sizes.tolist() == [[0, 1], [1, 0]]


def test_fill_raises_to_the_preferred_size_then_copies_while_memory_lasts() -> None:
    rates = {1: 10.0, 8: 96.0, 32: 100.0}
    profiles = tuple(profile(m, s, 100 + 10 * s, r) for m in "ab" for s, r in rates.items())
    wanted = problem(
        devices=(GPU, replace(GPU, name="gpu-1", capacity_bytes=390 * MIB)), profiles=profiles, batch_sizes=(1, 8, 32)
    )
    assert preferred_batch_size(wanted)("a", "gpu") == 8
    start = worst_fit(wanted)
    assert start.sizes.tolist() == [[1, 1], [0, 0]]
    assert fill(wanted, start).sizes.tolist() == [[8, 8], [8, 8]]
    assert fill(wanted, start, copies=1).sizes.tolist() == [[8, 8], [0, 0]]
    assert fill(wanted, start, lambda member, device_class: 32).sizes.tolist() == [[32, 32], [8, 8]]


@given(problems())
@settings(deadline=None, max_examples=100)
def test_the_plain_rules_are_feasible_whenever_they_return(wanted: Problem) -> None:
    try:
        start = worst_fit(wanted)
    except DoesNotFit:
        return
    assert misfits(wanted, start) == []
    filled = fill(wanted, start)
    assert misfits(wanted, filled) == []
    assert (filled.sizes >= start.sizes).all()


def test_a_thousand_devices_are_filled_quickly() -> None:
    wanted = random_problem(1, 1000, 36)
    assert misfits(wanted, fill(wanted, worst_fit(wanted), copies=2)) == []
