"""Changes and faults on two nodes while a pod asks without a pause: no wrong answer, and a failed request only where
`docs/operating.md` says so. In the order in which they are written; one that fails need not fail the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.cluster import CHART, Cluster, until
from tests.cluster.placing import cut_off, gateways, is_ready, operators
from tests.cluster.serving import (
    ASKERS,
    Client,
    Ended,
    Ensemble,
    claim_of_models,
    client_of,
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
JUST_THE_ONE = {factor_of(FACTORS, EQUAL)}
READY_S = 240.0
REPLACED_S = 180.0
# What is asked of it; the wait is longer to tell how long it took.
SERVED_AGAIN_S = 60.0
# From a node that is not Ready to a Service without its gateway, everywhere.
UNPUBLISHED_S = 5.0
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


def test_gateways_and_operators_are_spread_over_the_nodes(
    cluster: Cluster, system: str, ensemble: Ensemble, nodes: tuple[str, str]
) -> None:
    for replicas in (gateways(ensemble), operators(cluster, system)):
        assert sorted(replicas.nodes().values()) == sorted(nodes), replicas.nodes()


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
    found = ended(then, what, {before, after})
    assert set(found.factors) == {before, after}
    assert not found.harms, found


def test_devices_up_and_down_fail_no_request(ensemble: Ensemble, client: Client, ended: Ended) -> None:
    then = client.asked()
    for count in (REPLICATED, 2):
        target = f"inferenceensemble/{ensemble.name}"
        ensemble.cluster.kubectl("scale", target, f"--replicas={count}", "-n", ensemble.namespace)
        has_workers(ensemble, count)
    found = ended(then, "devices up and down", JUST_THE_ONE)
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
    found = ended(then, "worker pod deleted", JUST_THE_ONE)
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
    found = ended(then, "gateway rolled", JUST_THE_ONE)
    assert not found.harms, found


def test_a_gateway_pod_killed_loses_only_what_is_in_flight_there(
    ensemble: Ensemble, client: Client, ended: Ended, nodes: tuple[str, str]
) -> None:
    replicas = gateways(ensemble)
    replicas.spread(nodes)
    victim, survivor = sorted(replicas.standing())
    with client_of(ensemble, nodes[0], replicas.standing()[survivor]["status"]["podIP"]) as beside:
        then, then_beside = client.asked(), beside.asked()
        replicas.delete(victim, "--force", "--grace-period=0")
        until(lambda: len(replicas.standing().keys() - {victim}) == 2, 120, "a new gateway", ensemble.explanation)
        found = ended(then, "gateway pod killed", JUST_THE_ONE)
        surviving = ended(then_beside, "gateway pod killed: asking the one that stayed", JUST_THE_ONE, beside)
    assert not surviving.harms, surviving
    assert set(found.harms) <= {"lost"}, found
    assert found.outcomes["lost"] <= ASKERS, found


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
    found = ended(then, "operator upgraded", {*JUST_THE_ONE, factor_of(FACTORS, weights)})
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
    found = ended(then, "node drained", JUST_THE_ONE)
    assert not found.harms, found


@pytest.fixture
def spread(ensemble: Ensemble, nodes: tuple[str, str], system: str) -> None:
    """Gateways, operators and each member's instances are on both nodes, and the one that may go has the leader.

    A drain has left all on the other: only pods that are made anew are spread.
    """
    gateways(ensemble).spread(nodes)
    acting = operators(ensemble.cluster, system)
    acting.spread(nodes)
    acting.lead_from(nodes[1])
    acting.spread(nodes)
    assert acting.nodes()[acting.leader()] == nodes[1]
    ensemble.apply(spec_of(URIS, EQUAL, 2))
    has_workers(ensemble, 2)
    replicated(ensemble)
    where = {name: pod["spec"]["nodeName"] for name, pod in ensemble.pods("worker").items()}
    assert set(where.values()) == set(nodes)
    staying = {name for name, there in where.items() if there == nodes[0]}
    assert all(held & staying for held in ensemble.instances().values()), ensemble.instances()


def all_workers_on(ensemble: Ensemble, node: str) -> bool:
    """Whether it has all its workers there, and none elsewhere or ending."""
    workers = ensemble.pods("worker").values()
    return len(workers) == REPLICATED and all(
        pod["spec"].get("nodeName") == node and "deletionTimestamp" not in pod["metadata"] for pod in workers
    )


@pytest.mark.usefixtures("spread")
def test_a_node_that_is_cut_off_is_replaced(
    ensemble: Ensemble, client: Client, ended: Ended, nodes: tuple[str, str], record: Callable[[str], None], system: str
) -> None:
    cluster, (staying, going) = ensemble.cluster, nodes
    replicas, acting = gateways(ensemble), operators(cluster, system)
    [address] = [pod["status"]["podIP"] for pod in replicas.standing().values() if pod["spec"]["nodeName"] == staying]
    assert acting.nodes()[acting.leader()] == going
    with client_of(ensemble, staying, address) as beside:
        then, then_beside = client.asked(), beside.asked()
        with cut_off(going):
            cut_at = time.monotonic()
            until(lambda: not is_ready(cluster, going), 120, f"{going} is not Ready")
            began = time.monotonic()
            until(lambda: acting.nodes().get(acting.leader()) == staying, 120, "another leader")
            led_again_s = time.monotonic() - began
            until(lambda: all_workers_on(ensemble, staying), REPLACED_S, "all workers elsewhere", ensemble.explanation)
            replaced_s = time.monotonic() - began
            ensemble.settled(REPLICATED, REPLACED_S)
            served_again_s = time.monotonic() - began
            client.goes_on(300)
            found = ended(then, "node cut off", JUST_THE_ONE)
            last_harm_s = time.monotonic() - began - found.calm_s
            surviving = ended(then_beside, "node cut off: asking the gateway that stayed", JUST_THE_ONE, beside)
        record(
            f"the node was NotReady {began - cut_at:.1f} s after the cut; s after that: another operator led"
            f" {led_again_s:.1f}, workers were placed {replaced_s:.1f}, served by new workers {served_again_s:.1f},"
            f" the last request without an answer began {last_harm_s:.1f}"
        )
        until(lambda: is_ready(cluster, going), 120, f"{going} is Ready again")
    assert not surviving.harms, surviving
    # Until the cluster knows that the node is gone, its gateway is still an address of the Service.
    assert set(found.harms) <= {"unconnected", "lost"}, found
    assert found.outcomes["lost"] <= ASKERS, found
    assert last_harm_s < UNPUBLISHED_S
    assert served_again_s < SERVED_AGAIN_S
