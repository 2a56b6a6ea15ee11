"""Helm as the tests call it: version 3 and 4, each if it is there, looked for where the API server's binaries are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/ensemble-operator"
CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
NAMES = ("helm", "helm3")
# The oldest Kubernetes that the chart names; without a cluster Helm assumes one of its own time.
OLDEST = "1.30.0"

Manifest = dict[str, Any]


def tool(name: str) -> Path:
    """A binary of KUBEBUILDER_ASSETS or of the PATH; skips the test if there is none."""
    assets = os.environ.get("KUBEBUILDER_ASSETS", "")
    found = shutil.which(name, path=os.pathsep.join(filter(None, (assets, os.environ.get("PATH", "")))))
    if found is None:
        pytest.skip(f"{name} is not in KUBEBUILDER_ASSETS nor on the PATH")
    return Path(found)


@dataclass(frozen=True, slots=True)
class Helm:
    """One version of Helm, with folders of its own, and the cluster that it talks to, if any."""

    program: Path
    home: Path
    kubeconfig: Path | None = None

    def run(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run it. A failure is the test's, with what Helm said."""
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HELM_", "KUBE"))},
            "HOME": str(self.home),
            "KUBECONFIG": str(self.kubeconfig or self.home / "none"),
        }
        command = [str(part) for part in (self.program, *arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done

    def render(self, *arguments: str | Path, name: str = "release", namespace: str = "system") -> list[Manifest]:
        """The manifests of the chart, hooks too."""
        where = ("--namespace", namespace, "--kube-version", OLDEST)
        done = self.run("template", name, CHART, *where, *arguments)
        return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]

    def refusal(self, *arguments: str | Path) -> str:
        """Why the chart is not rendered with these values."""
        done = self.run("template", "release", CHART, "--kube-version", OLDEST, *arguments, check=False)
        assert done.returncode != 0, done.stdout
        return done.stderr


def is_hook(manifest: Manifest) -> bool:
    """Whether it is part of `helm test` only."""
    return "helm.sh/hook" in manifest["metadata"].get("annotations", {})


def only(manifests: list[Manifest], kind: str, *, ending: str = "") -> Manifest:
    """The one manifest of a kind that is no hook."""
    found = [
        manifest
        for manifest in manifests
        if manifest["kind"] == kind and manifest["metadata"]["name"].endswith(ending) and not is_hook(manifest)
    ]
    assert len(found) == 1, [manifest["metadata"]["name"] for manifest in found]
    return found[0]


def pod_templates(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The template of every pod that the chart makes."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield {"metadata": {"labels": manifest["metadata"]["labels"]}, "spec": manifest["spec"]}
