"""`python -m ensemble_worker measure` as the runner calls it: a fresh process, JSON lines, a cap that holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import models


def _measure(*arguments: str, spec: Any = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ensemble_worker", "measure", *arguments]
    text = None if spec is None else json.dumps(spec)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=90)


def _spec(path: Path, **more: Any) -> dict[str, Any]:
    model_format = {".pt2": "torch-export", ".pt": "torchscript"}[path.suffix]
    return {"member": {"name": "cat", "digest": "d", "uri": path.as_uri(), "format": model_format}, **more}


def _lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


CPU = ("--device", "cpu-0", "--cores", "0", "--spec", "-")


class Wide(nn.Module):
    """8 MiB of weights, and as many of activations for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2 << 20, 1) / (1 << 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight)).sum(-1, keepdim=True)


def test_one_line_for_the_load_and_one_for_each_size(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1, hidden=2048)
    first, *sizes = _lines(_measure(*CPU, "--sizes", "64,1", "--budget-s", "60", spec=_spec(path)))
    assert first["signature"]["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [64]}]
    assert first["signature"]["dynamicBatch"] is True
    assert first["loadS"] > 0
    weights = 4 * (64 * 2048 + 2048 * 2048 + 2048 * 10)
    assert weights < first["memoryBytes"] < 4 * weights
    assert first["overheadBytes"] > 100 << 20
    assert [s["batchSize"] for s in sizes] == [1, 64]
    for size in sizes:
        assert size["rowsPerS"] == pytest.approx(size["batchSize"] / size["latencyS"], rel=1e-2)
        assert size["memoryBytes"] > weights
        assert size["spread"] >= 0
    assert sizes[1]["rowsPerS"] > sizes[0]["rowsPerS"]


def test_a_spent_budget_still_gives_the_smallest_size(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    lines = _lines(_measure(*CPU, "--sizes", "1,2,4", "--budget-s", "0", spec=_spec(path)))
    assert [line.get("batchSize") for line in lines] == [None, 1]


def test_memory_is_capped_and_said(tmp_path: Path) -> None:
    path = models.export_module(tmp_path / "m.pt2", Wide().eval(), [torch.zeros(2, 1)])
    lines = _lines(
        _measure(*CPU, "--sizes", "1,64", "--memory-limit", str(400 << 20), "--budget-s", "60", spec=_spec(path))
    )
    assert lines[1]["batchSize"] == 1
    assert lines[1]["memoryBytes"] > 8 << 20
    assert lines[2]["kind"] == "memory"
    assert lines[2]["batchSize"] == 64
    assert "does not fit in memory with 64 rows" in lines[2]["error"]


def test_a_model_that_cannot_be_loaded_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_text("no model")
    (line,) = _lines(_measure(*CPU, spec=_spec(path)))
    assert line["kind"] == "model"
    assert "member 'cat'" in line["error"]


def test_torchscript_must_be_declared(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt", seed=1)
    (line,) = _lines(_measure(*CPU, spec=_spec(path)))
    assert "declare them in spec.input" in line["error"]
    tensors = {name: [{"name": name, "datatype": "FP32", "shape": shape}] for name, shape in (("x", [64]), ("y", [10]))}
    lines = _lines(_measure(*CPU, spec=_spec(path, inputs=tensors["x"], outputs=tensors["y"])))
    assert lines[1]["batchSize"] == 1


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--device", "cpu-0"), "--spec"),
        (("--device", "cpu-0", "--spec", "/no/such"), "No such file"),
        (("--device", "gpu", "--cores", "0", "--spec", "-"), "device 'gpu'"),
        (("--device", "cpu-999", "--spec", "-"), "this machine has"),
        (("--device", "cpu-0", "--spec", "-", "--sizes", "0"), "--sizes"),
        (("--device", "cpu-0", "--spec", "-", "--sizes", "a"), "--sizes"),
    ],
)
def test_a_wrong_question_is_exit_code_1(tmp_path: Path, arguments: tuple[str, ...], cause: str) -> None:
    done = _measure(*arguments, spec=_spec(tmp_path / "m.pt2"))
    assert done.returncode == 1
    assert cause in done.stderr


def test_a_spec_that_is_no_spec_names_the_field() -> None:
    done = _measure(*CPU, spec={"member": {"name": "cat"}})
    assert done.returncode == 1
    assert "$.member" in done.stderr
