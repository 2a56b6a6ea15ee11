"""A cluster of nodes as the tests use it: kubectl, Helm, pods that run one command, and waiting with a deadline."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/ensemble-operator"
IMAGES = "ENSEMBLE_TEST_IMAGES"
TARGETS = ("operator", "gateway", "worker")
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}

Found = TypeVar("Found")
Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster that KUBECONFIG names, with our images in it as REGISTRY/TARGET:TAG."""

    registry: str
    tag: str

    @staticmethod
    def of(environment: Mapping[str, str]) -> Cluster:
        """The one that the environment names; skips the test if it names none."""
        if "KUBECONFIG" not in environment or IMAGES not in environment:
            pytest.skip(f"KUBECONFIG must name a cluster that may be changed, {IMAGES} our images there: REGISTRY:TAG")
        registry, _, tag = environment[IMAGES].rpartition(":")
        assert registry, f"{IMAGES}={tag}: it must be REGISTRY:TAG, such as localhost:test"
        for program in ("kubectl", "helm"):
            assert shutil.which(program), f"{program} is not on the PATH"
        return Cluster(registry, tag)

    def image(self, target: str) -> str:
        """The reference of one of our images."""
        return f"{self.registry}/{target}:{self.tag}"

    @property
    def chart_values(self) -> str:
        """Our images as values of the chart, for `--set`."""
        return f"images.registry={self.registry},images.tag={self.tag}"

    def kubectl(self, *arguments: str, content: object = None, check: bool = True, timeout_s: float = 60) -> str:
        """What kubectl prints; its failure is the test's. `content` is sent as JSON."""
        return self._run("kubectl", *arguments, content=content, check=check, timeout_s=timeout_s)

    def helm(self, *arguments: str, timeout_s: float = 180) -> str:
        """What Helm prints; its failure is the test's."""
        return self._run("helm", *arguments, content=None, check=True, timeout_s=timeout_s)

    def get(self, *arguments: str) -> Any:
        """An object, or a list of them, as JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, manifest: Manifest, namespace: str) -> None:
        """Apply one manifest, and have its way where another manager (`kubectl scale`) has set a field."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-n", namespace, "-f", "-", content=manifest)

    def feed(self, namespace: str, name: str, script: str, source: Path | None = None, timeout_s: float = 120) -> None:
        """Run a shell script in a running pod, with a file of this machine as its input; its failure is the test's."""
        command = ("kubectl", "exec", "-i", name, "-n", namespace, "--", "sh", "-c", script)
        with (source or Path(os.devnull)).open("rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"

    def run_pod(
        self, namespace: str, target: str, *command: str, files: str = "", claim: str = "", timeout_s: float = 120
    ) -> str:
        """Run a command in a pod of one of our images, restricted as ours are; what it printed.

        `files` is a ConfigMap to mount at /files, `claim` a claim to mount at /claim. A command that fails is the
        test's failure.
        """
        name = f"run-{secrets.token_hex(4)}"
        return self.run(namespace, pod(name, self.image(target), command, files, claim), timeout_s)

    def run(self, namespace: str, manifest: Manifest, timeout_s: float = 120) -> str:
        """Run a pod to its end, and remove it; what it printed. One that fails is the test's failure."""
        name = str(manifest["metadata"]["name"])
        self.apply(manifest, namespace)
        try:
            phase = until(lambda: self._ended(name, namespace), timeout_s, f"pod {name}")
            output = self.kubectl("logs", name, "-n", namespace)
            assert phase == "Succeeded", output
            return output
        finally:
            self.kubectl("delete", "pod", name, "-n", namespace, "--wait=false", "--grace-period=0", check=False)

    def _ended(self, name: str, namespace: str) -> str:
        phase = str(self.get("pod", name, "-n", namespace)["status"].get("phase"))
        return phase if phase in ("Succeeded", "Failed") else ""

    def _run(self, *command: str, content: object, check: bool, timeout_s: float) -> str:
        text = None if content is None else json.dumps(content)
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False, env=dict(os.environ)
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


def until(
    found: Callable[[], Found | None], timeout_s: float, what: str, why: Callable[[], object] = lambda: ""
) -> Found:
    """The first true value of `found`; fails the test after `timeout_s`, with what `why` says then."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{why()}"
        time.sleep(0.5)


def pod(name: str, image: str, command: tuple[str, ...], files: str = "", claim: str = "") -> Manifest:
    """A pod that runs one command once, as the Pod Security Standard `restricted` wants it."""
    container: Manifest = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {}}]
    if files:
        container["volumeMounts"].append({"name": "files", "mountPath": "/files"})
        volumes.append({"name": "files", "configMap": {"name": files}})
    if claim:
        container["volumeMounts"].append({"name": "claim", "mountPath": "/claim", "readOnly": True})
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
