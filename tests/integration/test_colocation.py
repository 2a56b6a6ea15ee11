"""The co-location factor, measured by a real worker's process with real models on a CPU device: about 1, and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.profiles.colocating import Colocating, Factor, KeptFactors
from ensemble_operator.profiles.measurements import Device
from tests.support.models import export_mlp

# A machine that does other things besides loads torch for minutes.
pytestmark = pytest.mark.timeout(600)
DEADLINE_S = 200.0
X, Y = TensorSpec("x", "FP32", (8,)), TensorSpec("y", "FP32", (10,))
DEVICES = (Device("cpu-0", "cpu", "K", 1 << 30, (0,)),)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelSource]:
    monkeypatch.setenv("ENSEMBLE_DEVICE", "cpu")
    return {
        name: ModelSource(
            name,
            name,
            export_mlp(tmp_path / f"{name}.pt2", seed=seed, inputs=8, hidden=hidden).as_uri(),
            "torch-export",
        )
        for name, seed, hidden in (("a", 1, 256), ("b", 2, 512))
    }


@pytest.mark.slow
async def test_a_cpu_device_is_shared_in_turns_and_the_factor_is_kept(
    tmp_path: Path, sources: dict[str, ModelSource]
) -> None:
    said: list[str] = []
    rows = {"K": {"a": 64, "b": 64}}
    colocating = Colocating(DEVICES, tmp_path / "cache", said.append, budget_s=2.0)
    found = await colocating.factors(rows, sources, ((X,), (Y,)))
    assert said == ["measuring a, b together on cpu-0"]
    # Other work on this machine comes and goes between the windows.
    assert 0.2 < found["K"] < 4.0
    assert await colocating.factors(rows, sources, ((X,), (Y,))) == found
    assert len(said) == 1


async def test_without_time_for_it_only_what_is_known_counts(tmp_path: Path, sources: dict[str, ModelSource]) -> None:
    said: list[str] = []
    rows = {"K": {"a": 64, "b": 64}}
    colocating = Colocating(DEVICES, tmp_path / "cache", said.append, budget_s=0.5)
    assert await colocating.factors(rows, sources, ((X,), (Y,))) == {}
    assert said == ["co-location on K is not measured, perfect sharing assumed: no time is left for it"]
    KeptFactors(tmp_path / "cache").write("K", Factor(1.25))
    assert await colocating.factors(rows, sources, ((X,), (Y,))) == {"K": 1.25}


@pytest.mark.slow
async def test_members_that_cannot_be_loaded_leave_perfect_sharing(
    tmp_path: Path, sources: dict[str, ModelSource]
) -> None:
    said: list[str] = []
    torn = {**sources, "b": ModelSource("b", "b", "file:///none.pt2", "torch-export")}
    colocating = Colocating(DEVICES, tmp_path / "cache", said.append, budget_s=2.0)
    assert await colocating.factors({"K": {"a": 8, "b": 8}}, torn, ((X,), (Y,))) == {}
    assert "perfect sharing assumed: member 'b'" in said[-1]
    assert not (tmp_path / "cache" / "colocation").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "message"), [("{}", "members"), ('{"members":[]}', "at least two"), ("x", "malformed")]
)
def test_a_wrong_question_is_refused_in_one_line(question: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ensemble_worker", "colocate", "--device", "cpu-0"],
        input=question if question != "x" else json.dumps({})[:1],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("colocate: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr or question == "x"
