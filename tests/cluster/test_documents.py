"""The commands of docs/cluster.md, in their order, as they are written there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import ROOT, Cluster

DOCUMENT = ROOT / "docs/cluster.md"
MODELS = "examples/digits/models"
MANIFEST = "examples/digits/cluster.yaml"
NAMESPACE = "digits"
COMMAND_S = 330
# They train the models here, and need a second terminal.
NOT_HERE = ("make ", "kubectl port-forward", "curl ")


@pytest.fixture
def folder(cluster: Cluster, system: str, tmp_path: Path) -> Iterator[Path]:
    """A copy of what the commands read, with the image that this cluster has; the namespace is gone at the end."""
    models = tmp_path / MODELS
    models.mkdir(parents=True)
    train = [sys.executable, str(ROOT / "examples/digits/train.py"), "--out", str(models)]
    subprocess.run(train, check=True, timeout=240, capture_output=True)
    manifest = re.sub(r"localhost/gateway:\S+", cluster.image("gateway"), (ROOT / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(manifest)
    yield tmp_path
    cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")


@pytest.mark.timeout(700)
def test_the_first_ensemble_of_the_documents(folder: Path) -> None:
    commands = re.findall(r"^\$ (.+)$", DOCUMENT.read_text(), re.MULTILINE)
    commands = [command for command in commands if not command.startswith(NOT_HERE)]
    assert len(commands) == 9
    for command in commands:
        done = subprocess.run(
            shlex.split(command),
            cwd=folder,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command.startswith("kubectl get"):
            assert done.stdout.splitlines()[1].split()[1:4] == ["True", "4/4", "2/2"]
