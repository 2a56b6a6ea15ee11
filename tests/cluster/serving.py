"""An ensemble that multiplies, its model files in the cluster, and a pod that asks it all the while."""

from __future__ import annotations

import base64
import json
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from charts.tiny import WIDTH, tiny_network

from tests.cluster.cluster import ROOT, Cluster, Manifest, pod, until
from tests.cluster.nodes import claim_of_files

API = "ensemble-operator.io/v1alpha1"
SETTLE_S = 180.0
# The requests of a client that are under way at once.
ASKERS = 4
HARMS = ("unconnected", "lost", "failed", "wrong")


@dataclass(frozen=True, slots=True)
class Ensemble:
    """An ensemble of the cluster, by its name."""

    cluster: Cluster
    namespace: str
    name: str

    def apply(self, spec: Manifest) -> None:
        """Make it, or make it so."""
        metadata = {"name": self.name}
        manifest = {"apiVersion": API, "kind": "InferenceEnsemble", "metadata": metadata, "spec": spec}
        self.cluster.apply(manifest, self.namespace)

    def settled(self, devices: int, timeout_s: float = SETTLE_S) -> None:
        """Wait until the operator has nothing left to do for it and holds so many devices."""
        until(lambda: self._is_settled(devices), timeout_s, f"{self.name} with {devices} devices", self.explanation)

    def asked_for(self) -> int:
        """The devices that it shall have."""
        return int(self._get()["spec"]["devices"]["count"])

    def status(self) -> Any:
        """What the operator reports; empty before it has looked."""
        return self._get().get("status", {})

    def instances(self) -> dict[str, set[str]]:
        """The workers of each member, by the plan that its status shows."""
        found: dict[str, set[str]] = {}
        for row in self.status()["allocation"]["rows"]:
            for instance in row["instances"]:
                found.setdefault(instance["member"], set()).add(row["worker"])
        return found

    def pods(self, component: str = "") -> dict[str, Manifest]:
        """Its pods by name, of one component or of both."""
        selector = f"ensemble-operator.io/ensemble={self.name}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        items = self.cluster.get("pods", "-n", self.namespace, "-l", selector)["items"]
        return {item["metadata"]["name"]: item for item in items}

    def explanation(self) -> str:
        """What a person would look at."""
        described = self.cluster.kubectl("describe", "inferenceensemble", self.name, "-n", self.namespace)
        pods = self.cluster.kubectl("get", "pods", "-n", self.namespace, "-o", "wide")
        selector = f"ensemble-operator.io/ensemble={self.name}"
        logs = self.cluster.kubectl("logs", "-n", self.namespace, "-l", selector, "--tail=15", check=False)
        return f"{described}\n{pods}\n{logs}"

    def _get(self) -> Any:
        return self.cluster.get("inferenceensemble", self.name, "-n", self.namespace)

    def _is_settled(self, devices: int) -> bool:
        found = self._get()
        status = found.get("status", {})
        if status.get("observedGeneration") != found["metadata"]["generation"]:
            return False
        said = {c["type"]: c["status"] for c in status["conditions"]}
        held = status["devices"]["summary"] == f"{devices}/{devices}"
        quiet = said.get("Degraded") != "True" and said.get("RolloutBlocked") != "True"
        return held and said["Ready"] == "True" and quiet


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of requests: of all so far, or of those between two looks."""

    outcomes: Mapping[str, int]
    factors: Mapping[str, int]
    statuses: Mapping[str, int]
    last: tuple[str, ...]
    calm_s: float
    slowest_s: float
    errors: tuple[str, ...]

    def since(self, then: Asked) -> Asked:
        """What came after `then`. `slowest_s` stays that of all."""
        outcomes = {name: count - then.outcomes[name] for name, count in self.outcomes.items()}
        factors, statuses = _more(self.factors, then.factors), _more(self.statuses, then.statuses)
        return replace(self, outcomes=outcomes, factors=factors, statuses=statuses)

    @property
    def harms(self) -> dict[str, int]:
        """The requests without a right answer, by kind."""
        return {name: self.outcomes[name] for name in HARMS if self.outcomes[name]}


def _more(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {key: count - before.get(key, 0) for key, count in after.items() if count > before.get(key, 0)}


@dataclass(frozen=True, slots=True)
class Client:
    """The pod that asks."""

    cluster: Cluster
    namespace: str
    name: str

    def asked(self) -> Asked:
        """All so far."""
        line = json.loads(self.cluster.kubectl("logs", self.name, "-n", self.namespace, "--tail=1"))
        outcomes = {name: line[name] for name in ("sent", "answered", *HARMS)}
        last, errors = tuple(line["last"]), tuple(line["errors"])
        return Asked(outcomes, line["factors"], line["statuses"], last, line["calm_s"], line["slowest_s"], errors)

    def hears(self, factor: str, timeout_s: float) -> None:
        """Wait until every asker's newest answer is this many times its question."""
        until(lambda: self.asked().last == (factor,), timeout_s, f"answers of {factor}", self.asked)

    def goes_on(self, answers: int = 100) -> Asked:
        """What became of the requests from now until so many more are answered."""
        then = self.asked()
        return until(lambda: self._since(then, answers), 180, f"{answers} more answers", self.asked)

    def _since(self, then: Asked, answers: int) -> Asked | None:
        found = self.asked().since(then)
        return found if found.outcomes["answered"] >= answers else None


class Ended(Protocol):
    """Tells what became of a client's requests since an earlier tally; of the module's client if none is given.

    `what` has happened since, and each answer must be one of the `allowed` factors.
    """

    def __call__(self, then: Asked, what: str, allowed: Collection[str], asking: Client | None = None) -> Asked: ...


def start_client(ensemble: Ensemble, node: str, address: str = "", askers: int = ASKERS) -> Client:
    """Ask the ensemble from a pod on this node, until the namespace is gone; so many requests are under way at once.

    It asks the ensemble's Service, or one gateway by its address.
    """
    cluster, namespace = ensemble.cluster, ensemble.namespace
    name = f"steady-{secrets.token_hex(3)}"
    program = (ROOT / "tests/cluster/steady.py").read_text()
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"steady.py": program}}
    cluster.apply(files, namespace)
    command = ("python", "/files/steady.py", address or ensemble.name, ensemble.name, str(askers))
    client = pod(name, cluster.image("gateway"), command, name)
    client["spec"]["nodeName"] = node
    cluster.apply(client, namespace)
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "-n", namespace, "--timeout=120s", timeout_s=150)
    found = Client(cluster, namespace, name)
    until(lambda: cluster.kubectl("logs", name, "-n", namespace), 30, "its first line")
    return found


@contextmanager
def client_of(ensemble: Ensemble, node: str, address: str) -> Iterator[Client]:
    """A client that asks one gateway by its address, one request at a time, and has heard answers; gone at the end."""
    found = start_client(ensemble, node, address, 1)
    found.goes_on()
    yield found
    ensemble.cluster.kubectl("delete", "pod", found.name, "-n", ensemble.namespace, "--wait=false", "--grace-period=0")


def serve_models(cluster: Cluster, namespace: str, factors: Mapping[str, float], node: str = "") -> None:
    """The networks as http://models:8080/NAME.onnx, from a pod."""
    cluster.apply(_model_files(factors), namespace)
    server = pod("models", cluster.image("gateway"), ("python", "-m", "http.server", "8080", "-d", "/files"), "models")
    server["metadata"]["labels"] = {"app": "models"}
    if node:
        server["spec"]["nodeName"] = node
    cluster.apply(server, namespace)
    spec = {"selector": {"app": "models"}, "ports": [{"port": 8080}]}
    cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "models"}, "spec": spec}, namespace)
    cluster.kubectl("wait", "--for=condition=Ready", "pod/models", "-n", namespace, "--timeout=120s", timeout_s=150)


@contextmanager
def claim_of_models(cluster: Cluster, namespace: str, claim: str, factors: Mapping[str, float]) -> Iterator[None]:
    """The networks as pvc://CLAIM/NAME.onnx, from a folder of the same path and content on every node."""
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{name}.onnx": Path(folder, name) for name in factors}
        for name, factor in factors.items():
            Path(folder, name).write_bytes(tiny_network(factor))
        with claim_of_files(cluster, namespace, claim, files):
            yield


def _model_files(factors: Mapping[str, float]) -> Manifest:
    files = {f"{name}.onnx": base64.b64encode(tiny_network(factor)).decode() for name, factor in factors.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "models"}, "binaryData": files}


def spec_of(uris: Mapping[str, str], weights: Mapping[str, float], devices: int) -> Manifest:
    """Of an ensemble whose answer is the weighted mean of its members' multiples of the question."""
    members = [
        {"name": name, "model": {"uri": uris[name]}, "format": "onnx", "weight": weight}
        for name, weight in weights.items()
    ]
    return {
        "members": members,
        "input": {"name": "numbers", "datatype": "FP32", "shape": [WIDTH]},
        "output": {"name": "doubled", "datatype": "FP32", "shape": [WIDTH]},
        "combine": {"rule": "weightedMean"},
        "devices": {"count": devices, "resource": "cpu", "cores": "100m", "memory": "1Gi"},
        "batching": {"sizes": [1, 8], "maxQueueBytes": "16Mi"},
        "planning": {"profileBudget": "10s"},
        "gateway": {"replicas": 2, "timeout": "10s"},
    }


def factor_of(factors: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """How many times the question the answer is, as a client's tally writes it."""
    total = sum(weight * factors[name] for name, weight in weights.items())
    return f"{total / sum(weights.values()):.4f}"
