"""A platform engineer's way through the documents: all commands as they are written, from install to removal.

Which documents, and in which order, says tests/chart/commands.py. With Helm 3 where it is there, for the other tests
run with the newest.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chart.commands import Block, journey
from tests.cluster.cluster import ROOT, Cluster, until
from tests.cluster.serving import Client, Ensemble, serve_models, spec_of, start_client

MODELS = "examples/digits/models"
MANIFEST = "examples/digits/cluster.yaml"
NAMESPACES = ("digits", "ensembles")
CRD = "customresourcedefinition/inferenceensembles.ensemble-operator.io"
BLOCK_S = 330
# What a block must print, by a part of one of its commands.
SAID = {
    "helm install": r"kubectl wait",
    "helm test": r"Succeeded",
    "kubectl explain": r"quorum",
    "kubectl get --namespace digits inferenceensembles": r"digits +True +4/4 +[12]/2 ",
    "v2/models/digits": r'"name": ?"digits"',
    "service/digits": r"nv_inference_count",
    "pod/digits-worker-0 ": r"ensemble_worker_held_bytes",
    "describe --namespace digits": r"Type: +Ready",
    "kubectl logs": r'"digits/digits"|digits/digits',
    "kubectl get pods": r"Running",
    "helm show crds": r"serverside-applied",
    "helm upgrade": r"REVISION: 2",
    "helm rollback": r"Rollback was a success",
}


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where the commands are typed: a copy of what they read, and what stands for a reader's own names."""

    folder: Path
    environment: Mapping[str, str]
    names: Mapping[str, str]

    def typed(self, block: Block) -> str:
        """A block with a reader's own names."""
        script = "\n".join(block.commands)
        for name, value in self.names.items():
            script = re.sub(name, value, script)
        return script

    def run(self, block: Block) -> None:
        """Run a block; a command that fails is the test's failure. What it left in the background ends with it."""
        script = f"set -euo pipefail\ntrap 'jobs -p | xargs -r kill' EXIT\n{self.typed(block)}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=BLOCK_S,
            check=False,
        )
        where = f"{block.document}, {block.section or 'at the top'}\n{script}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, where
        for part, said in SAID.items():
            if part in script:
                assert re.search(said, done.stdout + done.stderr), f"no {said} in {where}"


@pytest.fixture
def terminal(cluster: Cluster, tmp_path: Path) -> Terminal:
    """With the images that this cluster has, a free port, and digits for every NAME."""
    models = tmp_path / MODELS
    models.mkdir(parents=True)
    train = [sys.executable, str(ROOT / "examples/digits/train.py"), "--out", str(models)]
    subprocess.run(train, check=True, timeout=240, capture_output=True)
    manifest = re.sub(r"localhost/gateway:\S+", cluster.image("gateway"), (ROOT / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "helm").symlink_to(shutil.which("helm3") or str(shutil.which("helm")))
    names = {
        r"images\.registry=\S+": cluster.chart_values,
        r"\bNAME(SPACE)?\b": "digits",
        r"curl -s": "curl -s --fail --retry 30 --retry-all-errors --retry-delay 1",
    }
    for port in ("8000", "8081"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            mine = free.getsockname()[1]
        names |= {rf" {port} &": f" {mine}:{port} &", rf"localhost:{port}": f"localhost:{mine}"}
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    return Terminal(tmp_path, environment, names)


@pytest.fixture
def clean(cluster: Cluster) -> Iterator[None]:
    """Nothing of an earlier journey is there, and nothing of this one at the end."""
    removed = ("--ignore-not-found", "--timeout=120s")
    cluster.kubectl("delete", "namespace", *NAMESPACES, *removed, timeout_s=150)
    cluster.kubectl("delete", CRD, *removed, timeout_s=150)
    yield
    cluster.helm("uninstall", "ensembles", "--namespace", "ensembles", "--ignore-not-found")
    cluster.kubectl("delete", "namespace", *NAMESPACES, "--ignore-not-found", "--wait=false")


@pytest.fixture
def kept(cluster: Cluster, clean: None, namespace: str) -> Client:
    """Asks an ensemble that is not there yet. What this makes in the namespace is all that no document tells."""
    serve_models(cluster, namespace, {"two": 2.0})
    node = cluster.get("pod", "models", "-n", namespace)["spec"]["nodeName"]
    return start_client(Ensemble(cluster, namespace, "kept"), node)


def everything(cluster: Cluster) -> set[str]:
    """Every object of the cluster that somebody could delete, but what its own parts make and events."""
    kinds = cluster.kubectl("api-resources", "--verbs=list,delete", "-o", "name").split()
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    columns = "custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name"
    lines = cluster.kubectl("get", ",".join(kinds), "--all-namespaces", "--no-headers", "-o", columns).splitlines()
    found = {" ".join(line.split()) for line in lines}
    return {line for line in found if not line.split()[1].startswith("kube-")}


@pytest.mark.timeout(900)
def test_the_documents_from_install_to_removal(
    cluster: Cluster, terminal: Terminal, kept: Client, namespace: str
) -> None:
    before = everything(cluster)
    *way, uninstall, removal = journey()
    assert [(block.document, block.section) for block in (uninstall, removal)] == [("install.md", "Uninstall")] * 2
    typed = "\n".join(map(terminal.typed, way))
    assert not [part for part in SAID if part not in typed], "what is to be said is never asked"
    ensemble = Ensemble(cluster, namespace, "kept")
    for index, block in enumerate(way):
        terminal.run(block)
        if index == 0:
            ensemble.apply(spec_of({"two": "http://models:8080/two.onnx"}, {"two": 1.0}, 1))
    ensemble.settled(1)
    kept.hears("2.0000", 60)
    then, pods = kept.asked(), set(ensemble.pods())
    terminal.run(uninstall)
    assert cluster.get("inferenceensemble", ensemble.name, "-n", namespace)["spec"]["members"]
    kept.goes_on()
    assert not kept.asked().since(then).harms
    assert set(ensemble.pods()) == pods
    terminal.run(removal)

    def left() -> set[str]:
        return everything(cluster) - before

    until(lambda: not left(), 120, "nothing is left", lambda: "\n".join(sorted(left())))
