"""Co-location: the factor of runs that sleep, spin or wait for each other, and which members are measured together."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ensemble_operator import resource_file
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.load.stage import stage_options
from ensemble_operator.profiles.colocating import Factor, KeptFactors, fullest_rows, known_factors
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.serve.preparation import plan_for
from ensemble_worker.colocation import factor_of

MIB, GIB = 1 << 20, 1 << 30


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
        time.sleep(0.004 if alone else 0.08)
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


def test_members_are_measured_together_at_the_sizes_that_plans_like() -> None:
    profiles = tuple(
        Profile(m, "big", size, 10.0 * size, 0.1, size * 10 * MIB) for m in ("a", "b") for size in (1, 8, 16)
    )
    problem = Problem((Member("a"), Member("b")), (DeviceSpec("x", "big", "cuda", 280 * MIB),), profiles, (1, 8, 16))
    # 252 MiB: 16 rows of one, and of the other what is left.
    assert fullest_rows(problem) == {"big": {"a": 16, "b": 8}}


def test_what_is_kept_is_known_of_gpus_and_only_if_it_can_be_true(tmp_path: Path) -> None:
    kept = KeptFactors(tmp_path)
    gpu, cpu = Device("cuda-0", "cuda", "gpu", GIB), Device("cpu-0", "cpu", "cores", GIB)
    for device_class in ("gpu", "cores"):
        kept.write(device_class, Factor(0.8))
    assert known_factors([gpu, cpu, gpu], tmp_path) == {"gpu": 0.8}
    for wrong in (0.0, -1.0):
        kept.write("gpu", Factor(wrong))
        assert known_factors([gpu], tmp_path) == {}


RESOURCE = """
apiVersion: ensemble-operator.io/v1alpha1
kind: InferenceEnsemble
metadata: {name: pair}
spec:
  members:
  - {name: a, model: {uri: "file:a.pt2"}, profile: &known {measurements: [{batchSize: 8, memory: 99Mi, latency: 10ms}]}}
  - {name: b, model: {uri: "file:b.pt2"}, profile: *known}
  input: {name: x, datatype: FP32, shape: [8]}
  output: {name: y, datatype: FP32, shape: [10]}
"""


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        raise AssertionError(text)


async def test_serve_plans_with_the_factor_that_is_kept_and_says_where_there_is_none(tmp_path: Path) -> None:
    """Members with declared profiles on a pretended GPU: nothing needs to be measured, and no process starts."""
    for name in "ab":
        (tmp_path / f"{name}.pt2").write_bytes(name.encode())
    ensemble = resource_file.parse_text(RESOURCE, "pair.yaml", tmp_path)
    devices = (Device("cuda-0", "cuda", "gpu", 4 * GIB),)
    options = stage_options(tmp_path / "pair.yaml", None, tmp_path / "cache", None)
    first, second = Notes(), Notes()
    before = await plan_for(ensemble, devices, devices, options, first)
    assert before.predicted_rows_per_s == pytest.approx(400)
    assert any("as if members shared gpu perfectly: `ensemble profile`" in text for text in first.said)
    KeptFactors(tmp_path / "cache").write("gpu", Factor(0.8))
    after = await plan_for(ensemble, devices, devices, options, second)
    assert after.predicted_rows_per_s == pytest.approx(320)
    assert not any("perfectly" in text for text in second.said)
