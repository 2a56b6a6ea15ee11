"""`python -m ensemble_worker measure` as the runner calls it: a fresh process, JSON lines, a cap that holds."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from ensemble_worker.profiler import Measurement, _is_worthwhile
from tests.support import models

# A machine that does other things besides loads torch for minutes.
pytestmark = pytest.mark.timeout(600)
DEADLINE_S = 150.0


def _measure(*arguments: str, spec: Any = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ensemble_worker", "measure", *arguments]
    text = None if spec is None else json.dumps(spec)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=DEADLINE_S)


def _measured(size: int, rows_per_s: float) -> Measurement:
    return Measurement(size, rows_per_s, size / rows_per_s, 0.0, 0, "eager")


@pytest.mark.parametrize(
    ("rates", "size", "left_s", "worthwhile"),
    [
        ({1: 1000.0}, 8, 2.0, True),  # quick
        ({1: 1000.0, 8: 900.0}, 32, 2.0, True),  # still quick: a rate may rise again
        ({1: 1000.0, 8: 900.0}, 128, 2.0, False),  # half a second, for less than before
        ({1: 1000.0, 8: 1500.0}, 128, 2.0, True),
        ({1: 20.0}, 8, 2.0, True),  # the first two are compared, whatever they are
        ({1: 20.0}, 8, 1.0, False),  # no time for it
        ({1: 20.0, 8: 25.0}, 32, 5.0, False),
        ({1: 20.0, 8: 25.0}, 32, 6.0, False),
        ({1: 20.0, 8: 25.0}, 32, 6.2, True),
    ],
)
def test_a_larger_size_is_measured_if_it_is_quick_or_the_last_brought_more(
    rates: dict[int, float], size: int, left_s: float, worthwhile: bool
) -> None:
    found = [_measured(one, rate) for one, rate in rates.items()]
    assert _is_worthwhile(found, size, left_s) is worthwhile


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


def test_a_size_is_told_by_what_is_known_of_a_smaller_one(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1, hidden=512)
    _, *alone = _lines(_measure(*CPU, "--sizes", "16,64", "--budget-s", "60", spec=_spec(path)))
    # A smaller one that is said to take a thousand times as long makes all the others take so long.
    known = f"16:{1000 * alone[0]['latencyS']}"
    _, beside = _lines(_measure(*CPU, "--sizes", "64", "--known", known, "--budget-s", "60", spec=_spec(path)))
    assert beside["batchSize"] == 64
    assert 100 < beside["latencyS"] / alone[1]["latencyS"] < 10_000


def test_a_spent_budget_still_gives_the_smallest_size(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    lines = _lines(_measure(*CPU, "--sizes", "1,2,4", "--budget-s", "0", spec=_spec(path)))
    assert [line.get("batchSize") for line in lines] == [None, 1]


def test_loading_may_be_part_of_the_budget(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    head, *_ = lines = _lines(_measure(*CPU, "--sizes", "1,2", "--budget-s", "20", spec=_spec(path)))
    assert [line.get("batchSize") for line in lines] == [None, 1, 2]
    spent = ("--budget-s", f"{head['loadS'] / 4}", "--load-included")
    lines = _lines(_measure(*CPU, "--sizes", "1,2", *spent, spec=_spec(path)))
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
        ((*CPU, "--known", "8:x"), "'8:x' is not ROWS:SECONDS"),
        ((*CPU, "--known", "0:1.5"), "'0:1.5' is not ROWS:SECONDS"),
        ((*CPU, "--known", "8:inf"), "'8:inf' is not ROWS:SECONDS"),
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


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is the base class's
        """Silence."""


def test_a_download_is_reported_line_by_line_and_the_form_is_remembered(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    path = models.export_mlp(tmp_path / "web/m.pt2", seed=1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        spec = _spec(path)
        spec["member"]["uri"] = f"http://127.0.0.1:{server.server_address[1]}/m.pt2"
        lines = _lines(_measure(*CPU, "--cache-dir", str(tmp_path / "cache"), "--budget-s", "0", spec=spec))
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    size = path.stat().st_size
    assert lines[0] == {"downloadedBytes": size, "totalBytes": size}
    assert lines[1]["signature"]["dynamicBatch"] is True
    (remembered,) = (tmp_path / "cache/forms").iterdir()
    assert remembered.read_text() == lines[2]["form"]


PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "ensemble_worker", "measure", *sys.argv[1:], "--parent-pid", str(os.getpid())]
print(subprocess.Popen(command).pid, flush=True)
time.sleep(400)
"""


def test_a_measuring_process_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Its spec is a pipe that never ends; it reads it once it has asked to die with its parent."""
    pipe = tmp_path / "spec"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", PARENT, *CPU[:-1], str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        opened: list[int] = []
        try:
            _wait(lambda: _opens(pipe, opened))
            parent.kill()
            parent.wait(DEADLINE_S)
            _wait(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        finally:
            parent.kill()
            if child.is_running():
                child.kill()
            for one in opened:
                os.close(one)


def _opens(pipe: Path, opened: list[int]) -> bool:
    """Whether somebody reads the pipe; then it is kept open for writing."""
    with contextlib.suppress(OSError):
        opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    return bool(opened)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
