"""Co-location: the factor of runs that sleep, spin or wait for each other, and which members are measured together."""

from __future__ import annotations

import threading
import time

import pytest

from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.profiles.colocating import fullest_rows
from ensemble_worker.colocation import factor_of

MIB = 1 << 20


def sleeping(seconds: float) -> None:
    time.sleep(seconds)


def test_runs_that_overlap_completely_get_a_device_each() -> None:
    found = factor_of([lambda: sleeping(0.01)] * 3, serial=False, budget_s=1.5)
    assert 2 < found.factor < 4


def test_runs_that_take_turns_share_one_device() -> None:
    found = factor_of([lambda: sleeping(0.005), lambda: sleeping(0.01)], serial=True, budget_s=1.0)
    assert 0.6 < found.factor < 1.5


def test_runs_that_hinder_each_other_get_less_than_one() -> None:
    inside = threading.Semaphore(1)

    def hindered() -> None:
        alone = inside.acquire(blocking=False)
        time.sleep(0.002 if alone else 0.02)
        if alone:
            inside.release()

    found = factor_of([hindered, hindered], serial=False, budget_s=1.0)
    assert found.factor < 1.6
    assert min(found.alone) > 2 * min(found.together)


def test_an_error_in_a_run_is_raised() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        factor_of([lambda: sleeping(0.001), fail], serial=False, budget_s=0.1)


def test_the_fullest_row_of_each_class_of_gpu_is_measured() -> None:
    kinds = {"big": "cuda", "small": "cuda", "slow": "cpu"}
    profiles = tuple(
        Profile(m, kind, size, 10.0, 0.1, 100 * MIB) for m in ("a", "b", "c", "d") for kind in kinds for size in (2, 8)
    )
    devices = (
        DeviceSpec("x0", "big", "cuda", 400 * MIB),
        DeviceSpec("x1", "small", "cuda", 130 * MIB),
        DeviceSpec("x2", "slow", "cpu", 9000 * MIB),
    )
    problem = Problem(tuple(map(Member, "abcd")), devices, profiles, (2, 8))
    # The small one has room for a single member: nothing shares it.
    assert fullest_rows(problem) == {"big": {"a": 2, "b": 2, "c": 2}}
