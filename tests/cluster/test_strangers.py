"""A pod beside an ensemble's, in the same namespace and without its Secrets: what it can reach. Nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.serving import Ensemble, serve_models, spec_of

URIS = {"two": "http://models:8080/two.onnx"}
# A token, then requests as METHOD and URL. What is sent with a PUT is no plan.
STATUS = """
import sys, urllib.error, urllib.request
token, *asked = sys.argv[1:]
for method, url in zip(asked[::2], asked[1::2]):
    request = urllib.request.Request(url, b"{}" if method == "PUT" else None, method=method)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        print(urllib.request.urlopen(request, timeout=5).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""
# What each admin API answers to whom it trusts.
TRUSTED = {
    "worker": {
        ("GET", "/v1/plan"): 200,
        ("PUT", "/v1/plan"): 400,
        ("GET", "/v1/device"): 200,
        ("GET", "/v1/profile"): 200,
        ("PUT", "/v1/profile"): 400,
        ("DELETE", "/v1/profile"): 200,
        ("GET", "/metrics"): 200,
    },
    "gateway": {("GET", "/v1/plan"): 200, ("PUT", "/v1/plan"): 400, ("GET", "/v1/state"): 200},
}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ensemble(cluster: Cluster, system: str, namespace: str) -> Iterator[Ensemble]:
    """One member on one device, Ready."""
    found = Ensemble(cluster, namespace, "guarded")
    serve_models(cluster, namespace, {"two": 2.0})
    program = (ROOT / "tests/cluster/stranger.py").read_text()
    metadata = {"name": "stranger"}
    files = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"stranger.py": program}}
    cluster.apply(files, namespace)
    found.apply(spec_of(URIS, {"two": 1.0}, 1))
    found.settled(1)
    yield found
    cluster.kubectl("delete", "inferenceensemble", found.name, "-n", namespace)


def secret(ensemble: Ensemble, component: str) -> dict[str, str]:
    """The Secret of its gateways or of its workers: files by name."""
    found = ensemble.cluster.get("secret", f"{ensemble.name}-{component}", "-n", ensemble.namespace)["data"]
    return {name: base64.b64decode(content).decode().strip() for name, content in found.items()}


def handshake(ensemble: Ensemble, *keys: str) -> str:
    """What a pod with these keys gets from the worker's data socket."""
    host = ensemble.pods("worker")[f"{ensemble.name}-worker-0"]["status"]["podIP"]
    command = ("python", "/files/stranger.py", host, *keys)
    return ensemble.cluster.run_pod(ensemble.namespace, "gateway", *command, files="stranger").strip()


def test_a_worker_talks_only_to_the_gateways_key(ensemble: Ensemble) -> None:
    worker, gateway = secret(ensemble, "worker"), secret(ensemble, "gateway")
    assert handshake(ensemble, gateway["peer.public"], gateway["own.public"], gateway["own.secret"]) == "admitted"
    assert handshake(ensemble, worker["own.public"]) == "refused"
    # The workers' own keys are no gateway's.
    assert handshake(ensemble, worker["own.public"], worker["own.public"], worker["own.secret"]) == "refused"
    assert handshake(ensemble, "") == "refused"


@pytest.mark.parametrize("component", TRUSTED)
def test_the_admin_api_wants_the_token(ensemble: Ensemble, component: str) -> None:
    address = next(iter(ensemble.pods(component).values()))["status"]["podIP"]
    asked = [word for method, path in TRUSTED[component] for word in (method, f"http://{address}:8081{path}")]

    def statuses(token: str) -> list[int]:
        printed = ensemble.cluster.run_pod(ensemble.namespace, "gateway", "python", "-c", STATUS, token, *asked)
        return [int(word) for word in printed.split()]

    token = secret(ensemble, component)["admin.token"]
    refused = [401] * len(TRUSTED[component])
    assert statuses("") == refused
    assert statuses(token[:-1]) == refused
    assert statuses(token) == list(TRUSTED[component].values())


def test_no_pod_of_it_may_ask_the_cluster(ensemble: Ensemble) -> None:
    pods = ensemble.pods()
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods.values()} == {"worker", "gateway"}
    for name, pod in pods.items():
        assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume]
        command = ("exec", name, "-n", ensemble.namespace, "--", "ls", "/var/run/secrets/kubernetes.io")
        assert "serviceaccount" not in ensemble.cluster.kubectl(*command, check=False)
