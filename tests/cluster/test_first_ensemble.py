"""From `helm install` to an answer, and what may happen then: in the order in which a person would do it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator

import numpy
import pytest
import tritonclient.http as v2
from charts.tiny import WIDTH

from tests.cluster.cluster import Cluster, Manifest, until
from tests.cluster.serving import Ensemble, serve_models

NAME = "numbers"
FACTORS = {"two": 2.0, "four": 4.0}
READY_S = 180
# The third argument: for how many seconds a 503 is no answer yet.
ASK = """
import json, sys, time, urllib.error, urllib.request
tensor = {"name": "numbers", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
url, name, patience_s = sys.argv[1:]
request = urllib.request.Request(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode(),
                                 {"Content-Type": "application/json"})
deadline = time.monotonic() + float(patience_s)
while True:
    try:
        print(urllib.request.urlopen(request, timeout=30).read().decode())
        break
    except urllib.error.HTTPError as error:
        if error.code != 503 or time.monotonic() > deadline:
            raise
        time.sleep(0.5)
"""

pytestmark = pytest.mark.timeout(400)


def spec() -> Manifest:
    """Two members that multiply by two and by four; their mean multiplies by three."""
    members = [
        {"name": name, "model": {"uri": f"http://models:8080/{name}.onnx"}, "format": "onnx"} for name in FACTORS
    ]
    return {
        "members": members,
        "input": {"name": "numbers", "datatype": "FP32", "shape": [WIDTH]},
        "output": {"name": "doubled", "datatype": "FP32", "shape": [WIDTH]},
        "devices": {"count": 1, "resource": "cpu", "cores": "100m", "memory": "1Gi"},
        "batching": {"sizes": [1, 8], "maxQueueBytes": "16Mi"},
        "planning": {"profileBudget": "10s"},
        "gateway": {"replicas": 2},
    }


@pytest.fixture(scope="module")
def ensemble(cluster: Cluster, system: str, namespace: str) -> Ensemble:
    """Not applied yet; its model files are behind HTTP."""
    serve_models(cluster, namespace, FACTORS)
    return Ensemble(cluster, namespace, NAME)


@pytest.fixture(scope="module")
def ready(ensemble: Ensemble) -> float:
    """The ensemble was applied and is Ready; the seconds that it took."""
    began = time.monotonic()
    ensemble.apply(spec())
    wait_ready(ensemble)
    return time.monotonic() - began


def wait_ready(ensemble: Ensemble) -> None:
    def is_ready() -> bool:
        conditions = ensemble.status().get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    until(is_ready, READY_S, "Ready", ensemble.explanation)


def answer(cluster: Cluster, namespace: str, patience_s: float = 0) -> list[float]:
    """What the ensemble's Service answers to 1, 2, 3, 4, asked from a pod."""
    command = ("python", "-c", ASK, f"http://{NAME}:8000", NAME, str(patience_s))
    printed = cluster.run_pod(namespace, "gateway", *command)
    numbers: list[float] = json.loads(printed)["outputs"][0]["data"]
    return numbers


@contextlib.contextmanager
def forwarded(namespace: str) -> Iterator[str]:
    """HOST:PORT here of the ensemble's Service."""
    command = ["kubectl", "port-forward", f"service/{NAME}", ":8000", "-n", namespace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            port = re.search(r"127\.0\.0\.1:(\d+)", line)
            assert port is not None, line
            yield f"127.0.0.1:{port[1]}"
        finally:
            process.terminate()


def test_it_is_ready_and_answers_a_pod(cluster: Cluster, namespace: str, ready: float) -> None:
    assert answer(cluster, namespace) == [3, 6, 9, 12]
    assert ready < READY_S


def test_a_stock_client_gets_the_same_answer_and_each_members(cluster: Cluster, namespace: str, ready: float) -> None:
    rows = numpy.arange(2 * WIDTH, dtype=numpy.float32).reshape(2, WIDTH)
    tensor = v2.InferInput("numbers", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with forwarded(namespace) as address, v2.InferenceServerClient(address) as client:
        result = client.infer(NAME, [tensor], parameters={"members": True})
    numpy.testing.assert_array_equal(result.as_numpy("doubled"), 3 * rows)
    for name, factor in FACTORS.items():
        numpy.testing.assert_array_equal(result.as_numpy(f"{name}.doubled"), factor * rows)


def test_kubectl_shows_what_a_person_needs(cluster: Cluster, namespace: str, ready: float) -> None:
    head, row = cluster.kubectl("get", "ie", NAME, "-n", namespace).splitlines()
    assert head.split() == ["NAME", "READY", "MEMBERS", "DEVICES", "THROUGHPUT", "URL", "AGE"]
    name, is_ready, members, devices, throughput, url, _ = row.split()
    assert (name, is_ready, members, devices) == (NAME, "True", "2/2", "1/1")
    assert float(throughput) > 0
    assert url == f"http://{NAME}.{namespace}.svc:8000"


def test_kubectl_describe_tells_conditions_and_events(cluster: Cluster, namespace: str, ready: float) -> None:
    said, _, events = cluster.kubectl("describe", "ie", NAME, "-n", namespace).partition("Events:")
    for condition in ("Accepted", "DevicesAcquired", "Profiled", "Planned", "Ready", "Degraded"):
        assert re.search(rf"^ +Type: +{condition}$", said, re.MULTILINE), said
    assert f"all 2 members that are served answer at http://{NAME}.{namespace}.svc:8000" in said
    assert re.search(r"Normal +Ready ", events), events


def test_kubectl_wait_waits_for_conditions_and_devices(cluster: Cluster, namespace: str, ready: float) -> None:
    for condition in ("condition=Ready", "condition=Planned", "jsonpath={.status.devices.summary}=1/1"):
        said = cluster.kubectl("wait", f"ie/{NAME}", f"--for={condition}", "--timeout=30s", "-n", namespace)
        assert "condition met" in said


@pytest.mark.parametrize("path", ["", ".spec", ".spec.members", ".spec.members.model", ".spec.devices", ".status"])
def test_kubectl_explain_describes_every_field(cluster: Cluster, system: str, path: str) -> None:
    said = cluster.kubectl("explain", f"inferenceensembles{path}")
    assert "FIELDS:" in said
    assert "<no description>" not in said
    assert "<empty>" not in said


def test_no_pod_of_it_has_a_token(ensemble: Ensemble, ready: float) -> None:
    pods = ensemble.pods().values()
    assert {p["metadata"]["labels"]["app.kubernetes.io/component"] for p in pods} == {"worker", "gateway"}
    for found in pods:
        assert not [volume for volume in found["spec"]["volumes"] if "projected" in volume]


def test_devices_are_scaled_up_and_down(cluster: Cluster, namespace: str, ensemble: Ensemble, ready: float) -> None:
    for count in (2, 1):
        cluster.kubectl("scale", f"ie/{NAME}", f"--replicas={count}", "-n", namespace)

        def settled(count: int = count) -> bool:
            found = ensemble.status()
            rows = len(found.get("allocation", {}).get("rows", []))
            return (found["devices"]["summary"], rows, found["replicas"]) == (f"{count}/{count}", count, count)

        until(settled, READY_S, f"{count} devices", ensemble.explanation)
        assert answer(cluster, namespace) == [3, 6, 9, 12]


def test_a_deleted_worker_returns(cluster: Cluster, namespace: str, ensemble: Ensemble, ready: float) -> None:
    worker = f"{NAME}-worker-0"
    before = cluster.get("pod", worker, "-n", namespace)["metadata"]["uid"]
    cluster.kubectl("delete", "pod", worker, "-n", namespace, "--wait=false")

    def is_back() -> bool:
        found = ensemble.pods().get(worker)
        return found is not None and found["metadata"]["uid"] != before

    until(is_back, 120, "a new worker", ensemble.explanation)
    # It was the only one: until it serves, the answer is 503.
    assert answer(cluster, namespace, 60) == [3, 6, 9, 12]
    wait_ready(ensemble)


def test_the_services_show_metrics(cluster: Cluster, system: str, namespace: str, ready: float) -> None:
    def page(namespace: str, service: str) -> str:
        return cluster.kubectl("get", "--raw", f"/api/v1/namespaces/{namespace}/services/{service}/proxy/metrics")

    [service] = cluster.get("services", "-n", system, "-l", "app.kubernetes.io/component=metrics")["items"]
    name = service["metadata"]["name"]
    assert name.endswith("-metrics")

    # Either of two operators answers: the one that leads knows of the ensemble.
    def leaders() -> str | None:
        found = page(system, f"{name}:metrics")
        return found if re.search(r"^ensemble_operator_leader 1(\.0)?$", found, re.MULTILINE) else None

    assert re.search(
        r'^ensemble_operator_ensembles\{phase="Ready"\} 1(\.0)?$', until(leaders, 30, "a leader's page"), re.M
    )
    assert re.search(rf'^nv_inference_count\{{model="{NAME}"', page(namespace, f"{NAME}:8000"), re.M)


def test_helm_test_serves_an_ensemble_of_its_own(cluster: Cluster, system: str) -> None:
    said = cluster.helm("test", "ensembles", "--namespace", system, "--timeout", "150s", timeout_s=170)
    assert "Succeeded" in said
    until(lambda: not cluster.get("ie", "-n", system)["items"], 30, "the tested ensemble is gone")


def test_serving_goes_on_without_the_operator(cluster: Cluster, system: str, namespace: str, ready: float) -> None:
    cluster.helm("uninstall", "ensembles", "--namespace", system, "--wait")
    assert cluster.get("ie", NAME, "-n", namespace)["spec"]["members"]
    assert answer(cluster, namespace) == [3, 6, 9, 12]
    cluster.kubectl("delete", "ie", NAME, "-n", namespace)
    until(lambda: not children(cluster, namespace), 120, "its children are gone", lambda: children(cluster, namespace))


def children(cluster: Cluster, namespace: str) -> list[str]:
    kinds = "pods,statefulsets,deployments,services,configmaps,secrets,serviceaccounts,networkpolicies,pdb"
    found = cluster.get(kinds, "-n", namespace, "-l", f"ensemble-operator.io/ensemble={NAME}")["items"]
    return [f"{item['kind']} {item['metadata']['name']}" for item in found]
