"""The benchmark of the operator at size, small: nothing is refused, and an idle cluster costs next to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from benchmarks import control_plane as benchmark

from ensemble_operator.control.measure import IDLE_PERIOD_S
from tests.support.control_plane import ControlPlane


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_few_ensembles_become_ready_and_rest(
    control_plane: ControlPlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a control plane of its own; the fixture says where the binaries are, or skips."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    file = tmp_path / "figures.json"
    size = ["--ensembles", "3", "--nodes", "2", "--gpus", "3", "--within", "180"]
    # Quiet for longer than the operator lets pass between two looks at what is measured in the background.
    done = benchmark.main(
        [
            *size,
            "--quiet",
            str(IDLE_PERIOD_S + 2),
            "--idle",
            "4",
            "--folder",
            str(tmp_path / "logs"),
            "--json",
            str(file),
        ]
    )
    assert done == 0
    found = json.loads(file.read_text())
    assert len(found["readyS"]) == 3
    refused = found["start"]["refused"]
    assert set(refused) <= {"get secrets 404", "get leases 404"}, "only what is not there yet is refused"
    assert found["start"]["failed"] == 0
    assert set(found["idle"]["requests"]) <= {"update leases"}
    assert found["idle"]["reconciles"] == 0
    text = capsys.readouterr().out
    assert "Ready: first, median, last" in text
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
