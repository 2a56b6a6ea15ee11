"""Changes and faults on two nodes while a pod asks without a pause: no wrong answer, and a failed request only where
`docs/operating.md` says so. In the order in which they are written; one that fails need not fail the next.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.cluster import CHART, Cluster, until
from tests.cluster.serving import (
    Client,
    Ended,
    Ensemble,
    claim_of_models,
    factor_of,
    serve_models,
    spec_of,
    start_client,
)

FACTORS = {"two": 2.0, "four": 4.0, "eight": 8.0}
URIS = {
    "two": "http://models:8080/two.onnx",
    "four": "pvc://models/four.onnx",
    "eight": "http://models:8080/eight.onnx",
}
EQUAL = {"two": 1.0, "four": 1.0}
# Shell commands that take the node $NODE off the network as if its power were gone, and bring it back.
CUT, MEND = "ENSEMBLE_TEST_CUT", "ENSEMBLE_TEST_MEND"
READY_S = 240.0
REPLACED_S = 180.0
# What is asked of it; the wait is longer to tell how long it took.
SERVED_AGAIN_S = 60.0
REPLICATED = 4

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> tuple[str, str]:
    """The node of what must stay (the client, the model server), and the one that may go."""
    names = sorted(node["metadata"]["name"] for node in cluster.get("nodes")["items"])
    if len(names) < 2:
        pytest.skip("needs two nodes")
    return names[0], names[-1]


@pytest.fixture(scope="module")
def ensemble(
    cluster: Cluster, system: str, namespace: str, nodes: tuple[str, str], record: Callable[[str], None]
) -> Iterator[Ensemble]:
    """Two members on two devices, one from HTTP, one from a claim; Ready."""
    found = Ensemble(cluster, namespace, "product")
    serve_models(cluster, namespace, FACTORS, nodes[0])
    with claim_of_models(cluster, namespace, "models", FACTORS):
        began = time.monotonic()
        found.apply(spec_of(URIS, EQUAL, 2))
        found.settled(2, READY_S)
        record(f"Ready {time.monotonic() - began:.1f} s after it was applied")
        yield found
        cluster.kubectl("delete", "inferenceensemble", found.name, "-n", namespace)


@pytest.fixture(scope="module")
def client(ensemble: Ensemble, nodes: tuple[str, str]) -> Client:
    """A pod that asks the ensemble and has heard answers."""
    found = start_client(ensemble, nodes[0])
    found.hears(factor_of(FACTORS, EQUAL), 30)
    found.goes_on()
    return found


@pytest.fixture(autouse=True)
def steady(ensemble: Ensemble, client: Client) -> None:
    """Each test begins with an ensemble of two members that answers every request, on the devices that it has."""
    devices = ensemble.asked_for()
    ensemble.apply(spec_of(URIS, EQUAL, devices))
    ensemble.settled(devices)
    client.hears(factor_of(FACTORS, EQUAL), 60)
    found = client.goes_on()
    assert not found.harms, found


def has_workers(ensemble: Ensemble, count: int) -> None:
    """Wait until it has settled on so many devices, and the pods of others are gone."""
    ensemble.settled(count)
    until(lambda: len(ensemble.pods("worker")) == count, 120, f"{count} workers", ensemble.explanation)


def replicated(ensemble: Ensemble) -> None:
    """Give it more devices than it needs, and wait until each member has two instances."""
    ensemble.apply(spec_of(URIS, EQUAL, REPLICATED))
    ensemble.settled(REPLICATED)
    until(
        lambda: all(len(held) > 1 for held in ensemble.instances().values()), 120, "two instances", ensemble.instances
    )


@pytest.mark.parametrize(
    ("what", "weights"),
    [
        ("weight", {"two": 1.0, "four": 3.0}),
        ("member added", {"two": 1.0, "four": 1.0, "eight": 1.0}),
        ("member removed", {"four": 1.0}),
    ],
)
def test_a_change_of_members_fails_no_request(
    ensemble: Ensemble, client: Client, ended: Ended, what: str, weights: dict[str, float]
) -> None:
    then = client.asked()
    before, after = factor_of(FACTORS, EQUAL), factor_of(FACTORS, weights)
    devices = ensemble.asked_for()
    ensemble.apply(spec_of(URIS, weights, devices))
    client.hears(after, 120)
    ensemble.settled(devices)
    found = ended(then, what)
    assert set(found.factors) == {before, after}
    assert not found.harms, found


def test_devices_up_and_down_fail_no_request(ensemble: Ensemble, client: Client, ended: Ended) -> None:
    then = client.asked()
    for count in (REPLICATED, 2):
        target = f"inferenceensemble/{ensemble.name}"
        ensemble.cluster.kubectl("scale", target, f"--replicas={count}", "-n", ensemble.namespace)
        has_workers(ensemble, count)
    found = ended(then, "devices up and down")
    assert set(found.factors) == {factor_of(FACTORS, EQUAL)}
    assert not found.harms, found


def test_a_worker_pod_deleted_beside_another_instance_fails_no_request(
    ensemble: Ensemble, client: Client, ended: Ended
) -> None:
    replicated(ensemble)
    victim = sorted(ensemble.instances()["two"])[0]
    before = ensemble.pods("worker")[victim]["metadata"]["uid"]
    then = client.asked()
    ensemble.cluster.kubectl("delete", "pod", victim, "-n", ensemble.namespace, "--wait=false")
    until(lambda: is_replaced(ensemble, victim, before), 120, "a new worker", ensemble.explanation)
    ensemble.settled(REPLICATED)
    found = ended(then, "worker pod deleted")
    assert not found.harms, found


def is_replaced(ensemble: Ensemble, name: str, uid: str) -> bool:
    found = ensemble.pods("worker").get(name)
    return found is not None and found["metadata"]["uid"] != uid


def test_a_roll_of_the_gateway_fails_no_request(ensemble: Ensemble, client: Client, ended: Ended) -> None:
    then = client.asked()
    before = set(ensemble.pods("gateway"))
    deployment = f"deployment/{ensemble.name}-gateway"
    ensemble.cluster.kubectl("rollout", "restart", deployment, "-n", ensemble.namespace)
    ensemble.cluster.kubectl("rollout", "status", deployment, "-n", ensemble.namespace, "--timeout=240s", timeout_s=250)
    until(lambda: not before & set(ensemble.pods("gateway")), 180, "the former gateways are gone")
    found = ended(then, "gateway rolled")
    assert not found.harms, found


def test_an_upgrade_of_the_operator_restarts_no_pod_and_fails_no_request(
    ensemble: Ensemble, client: Client, ended: Ended, system: str
) -> None:
    cluster, then = ensemble.cluster, client.asked()
    before = {pod["metadata"]["uid"] for pod in ensemble.pods().values()}
    where = ("--namespace", system, "--reuse-values", "--wait", "--timeout", "120s")
    cluster.helm("upgrade", "ensembles", str(CHART), *where, "--set", "logLevel=DEBUG")
    weights = {"two": 1.0, "four": 3.0}
    ensemble.apply(spec_of(URIS, weights, ensemble.asked_for()))
    client.hears(factor_of(FACTORS, weights), 120)
    found = ended(then, "operator upgraded")
    assert {pod["metadata"]["uid"] for pod in ensemble.pods().values()} == before
    assert not found.harms, found


def test_a_drained_node_gives_no_wrong_answer_and_all_is_back(
    ensemble: Ensemble, client: Client, ended: Ended, nodes: tuple[str, str]
) -> None:
    replicated(ensemble)
    then, node = client.asked(), nodes[1]
    try:
        options = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=300s")
        ensemble.cluster.kubectl("drain", node, "--force", *options, timeout_s=320)
        assert not [pod for pod in ensemble.pods().values() if pod["spec"]["nodeName"] == node]
        ensemble.settled(REPLICATED)
    finally:
        ensemble.cluster.kubectl("uncordon", node)
    found = ended(then, "node drained")
    assert not found.harms, found


@contextlib.contextmanager
def cut_off(node: str) -> Iterator[None]:
    """The node is gone meanwhile."""
    commands = [os.environ.get(name) for name in (CUT, MEND)]
    if None in commands:
        pytest.skip(f"{CUT} and {MEND} must be shell commands that cut the node $NODE off and bring it back")
    cut, mend = (str(command) for command in commands)

    def shell(command: str) -> None:
        subprocess.run(["bash", "-ec", command], env={**os.environ, "NODE": node}, check=True, timeout=60)

    shell(cut)
    try:
        yield
    finally:
        shell(mend)


def is_ready(cluster: Cluster, node: str) -> bool:
    conditions = cluster.get("node", node)["status"]["conditions"]
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def test_a_node_that_is_cut_off_is_replaced(
    ensemble: Ensemble, client: Client, ended: Ended, nodes: tuple[str, str], record: Callable[[str], None]
) -> None:
    cluster, node = ensemble.cluster, nodes[1]
    # A drain has left all on the other node: those that come anew are spread.
    ensemble.apply(spec_of(URIS, EQUAL, 2))
    has_workers(ensemble, 2)
    replicated(ensemble)
    where = {name: pod["spec"]["nodeName"] for name, pod in ensemble.pods("worker").items()}
    assert set(where.values()) == set(nodes)
    staying = {name for name, there in where.items() if there == nodes[0]}
    assert all(held & staying for held in ensemble.instances().values()), ensemble.instances()
    then = client.asked()
    with cut_off(node):
        until(lambda: not is_ready(cluster, node), 120, f"{node} is not Ready")
        began = time.monotonic()

        def all_elsewhere() -> bool:
            workers = ensemble.pods("worker").values()
            return len(workers) == REPLICATED and all(
                pod["spec"].get("nodeName") == nodes[0] and "deletionTimestamp" not in pod["metadata"]
                for pod in workers
            )

        until(all_elsewhere, REPLACED_S, "all workers on the other node", ensemble.explanation)
        ensemble.settled(REPLICATED, REPLACED_S)
        served_again_s = time.monotonic() - began
        record(f"served by new workers {served_again_s:.1f} s after the node was NotReady")
        after = client.goes_on(300)
        assert not after.harms, after
        found = ended(then, "node cut off")
    until(lambda: is_ready(cluster, node), 120, f"{node} is Ready again")
    # Until the cluster knows that the node is gone, its gateway is still an address of the Service.
    assert set(found.harms) <= {"unconnected", "lost"}, found
    assert served_again_s < SERVED_AGAIN_S
