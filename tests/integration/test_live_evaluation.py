"""`evaluate: live`: candidates run through real workers and gateway, the fastest is kept, Ctrl-C keeps the best."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.support.models import export_mlp
from tests.support.serving import wait_until_gone

# A machine that does other things besides starts servers in minutes.
pytestmark = pytest.mark.timeout(900)
DEADLINE_S = 280.0
RESOURCE = """
apiVersion: ensemble-operator.io/v1alpha1
kind: InferenceEnsemble
metadata: {name: pair}
spec:
  members:
  - {name: small, model: {uri: "file:small.pt2"}}
  - {name: large, model: {uri: "file:large.pt2"}}
  input: {name: x, datatype: FP32, shape: [8]}
  output: {name: y, datatype: FP32, shape: [10]}
  batching: {sizes: [1, 16], maxQueueBytes: 16Mi}
  planning: {evaluate: live, maxIterations: 3, profileBudget: 60s}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for name, (seed, hidden) in {"small": (1, 16), "large": (3, 64)}.items():
        export_mlp(folder / f"{name}.pt2", seed=seed, inputs=8, hidden=hidden)
    (folder / "ensemble.yaml").write_text(RESOURCE)
    # Far more candidates than can run before somebody asks to stop.
    (folder / "many.yaml").write_text(RESOURCE.replace("[1, 16]", "[1, 2, 3, 4, 6, 8, 12, 16]"))
    return folder


def started(folder: Path, *arguments: str, file: str = "ensemble.yaml") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ensemble_operator", "plan", str(folder / file), "--cpu-devices", "1"]
    return subprocess.Popen(
        [*command, "--cache-dir", str(folder / "cache"), "-o", "json", "--explain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ENSEMBLE_DEVICE": "cpu"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_fastest_candidate_is_the_plan(folder: Path) -> None:
    with started(folder, "--window", "300ms") as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    (plan,) = json.loads(out)["plans"]
    measured = [
        float(found[1]) for line in plan["explanation"]["tried"] if (found := re.match(r"measured: (\S+) rows/s", line))
    ]
    assert 2 <= len(measured) <= 3
    assert min(measured) > 0
    assert plan["measuredRowsPerS"] == pytest.approx(max(measured), rel=1e-4)


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far_and_leaves_nothing(folder: Path) -> None:
    with started(folder, "--strategy", "greedy-paper", "--window", "2s", file="many.yaml") as process:
        children: list[psutil.Process] = []
        said: list[str] = []

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                # At most every 5 s, so by the first of them with a best there is one.
                if "best so far" in line and not children:
                    children.extend(psutil.Process(process.pid).children(recursive=True))
                    process.send_signal(signal.SIGINT)

        reader = threading.Thread(target=read)
        reader.start()
        assert process.stdout is not None
        out = process.stdout.read()
        reader.join(DEADLINE_S)
        assert process.wait(DEADLINE_S) == 0, said
    (plan,) = json.loads(out)["plans"]
    assert plan["measuredRowsPerS"] > 0
    assert any("stopping with the best so far" in line for line in said)
    assert len(children) >= 2
    wait_until_gone(children)


@pytest.mark.slow
def test_devices_of_elsewhere_are_scored_by_the_model(folder: Path) -> None:
    inventory = folder / "inventory.yaml"
    inventory.write_text("devices: [{class: far, kind: cuda, count: 2, capacityMiB: 1000}]")
    profile = {"deviceClass": "far", "batchSize": 16, "rowsPerS": 100.0, "latencyS": 0.16, "memoryBytes": 1000}
    profiles = folder / "far.yaml"
    profiles.write_text(json.dumps({"profiles": [{"member": m, **profile} for m in ("small", "large")]}))
    with started(folder, "--inventory", str(inventory), "--profiles", str(profiles)) as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "cannot run here: they are scored by the model" in errors
    assert "measuredRowsPerS" not in json.loads(out)["plans"][0]
