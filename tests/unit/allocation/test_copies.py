"""Further instances of members, for when a device is busy or lost: how many there are, and with which batches."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import Plan, plan
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from tests.unit.allocation.problems import MIB, misfits, random_problem


def planned(problem: Problem, **changes: int) -> Plan:
    options = PlanOptions(max_iterations=3, max_neighbours=30, time_limit_s=2.0, copies=2)
    return plan(problem, replace(options, **changes), clock=time.perf_counter)  # type: ignore[arg-type]


def test_members_get_a_second_instance_where_memory_allows() -> None:
    problem = random_problem(6, 4, 4, capacity_mib=30_000)
    assert (np.count_nonzero(planned(problem).matrix.sizes, axis=0) >= 2).all()


def test_copies_take_as_large_batches_as_planned() -> None:
    # 128 rows are hardly slower than 512: preferred, and yet not what the plan has.
    profiles = tuple(
        Profile(member, "gpu", size, rate, size / rate, memory_mib * MIB)
        for member in ("a", "b")
        for size, rate, memory_mib in ((128, 970.0, 1000), (512, 1000.0, 3000))
    )
    devices = tuple(DeviceSpec(f"d{i}", "gpu", "cuda", 10_000 * MIB) for i in range(2))
    found = planned(Problem((Member("a"), Member("b")), devices, profiles, (128, 512), headroom=0.0))
    assert set(found.matrix.sizes.flat) == {512}


def test_copies_take_smaller_batches_where_more_of_them_fit_then() -> None:
    costs = {
        "a": ((177.0, 1083), (339.0, 1563), (354.0, 3483)),
        "b": ((238.0, 1514), (456.0, 3242), (475.0, 10154)),
        "c": ((325.0, 1143), (624.0, 1911), (650.0, 4983)),
    }
    profiles = tuple(
        Profile(member, "gpu", size, rate, size / rate, memory_mib * MIB)
        for member, points in costs.items()
        for size, (rate, memory_mib) in zip((32, 128, 512), points, strict=True)
    )
    devices = tuple(DeviceSpec(f"d{i}", "gpu", "cuda", 14_232 * MIB) for i in range(3))
    problem = Problem(tuple(Member(name) for name in costs), devices, profiles, (32, 128, 512), headroom=0.0)
    found = planned(problem, max_iterations=1, max_neighbours=20)
    assert np.count_nonzero(found.matrix.sizes) == 7
    assert misfits(problem, found.matrix) == []


@pytest.mark.parametrize(("seed", "devices", "members"), [(0, 3, 6), (1, 3, 6), (7, 2, 5)])
def test_rounding_costs_no_copy(seed: int, devices: int, members: int) -> None:
    problem = random_problem(seed, devices, members, (1, 8, 32, 128), 16_000, 1)
    assert (np.count_nonzero(planned(problem).matrix.sizes, axis=0) >= 2).all()
