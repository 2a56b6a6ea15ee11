"""A member that lives on one worker, and that worker lost while a pod asks without a pause: what `docs/operating.md`
says happens. With a quorum the others answer meanwhile; without, requests fail with 503, and none hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import Cluster, Manifest, until
from tests.cluster.serving import Client, Ended, Ensemble, factor_of, serve_models, spec_of, start_client

FACTORS = {"two": 2.0, "four": 4.0}
URIS = {name: f"http://models:8080/{name}.onnx" for name in FACTORS}
EQUAL = {"two": 1.0, "four": 1.0}
FULL = factor_of(FACTORS, EQUAL)
# Two such members are more than a worker of `spec_of` holds.
PROFILE = {"measurements": [{"batchSize": size, "memory": "500Mi", "latency": "1ms"} for size in (1, 8)]}
TIMEOUT_S = 2.0
# What an answer may take beyond the deadline, on a busy machine.
LATE_S = 2.0
READY_S = 240.0
BACK_S = 120.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", autouse=True)
def models(cluster: Cluster, system: str, namespace: str) -> None:
    """The networks."""
    serve_models(cluster, namespace, FACTORS)


@pytest.fixture
def ensemble(cluster: Cluster, namespace: str, request: pytest.FixtureRequest) -> Iterator[Ensemble]:
    """The one whose spec is the test's parameter; Ready."""
    name, spec = request.param
    found = Ensemble(cluster, namespace, name)
    found.apply(spec)
    found.settled(spec["devices"]["count"], READY_S)
    yield found
    cluster.kubectl("delete", "inferenceensemble", name, "-n", namespace)


@pytest.fixture
def client(ensemble: Ensemble) -> Client:
    """A pod that asks the ensemble and has heard answers."""
    node = ensemble.cluster.get("pod", "models", "-n", ensemble.namespace)["spec"]["nodeName"]
    found = start_client(ensemble, node)
    found.goes_on()
    return found


def one_worker_each() -> Manifest:
    """Of two members that no worker holds together; one of them is enough for an answer."""
    spec = spec_of(URIS, EQUAL, len(EQUAL))
    members = [{**member, "profile": PROFILE} for member in spec["members"]]
    return {**spec, "members": members, "combine": {"rule": "weightedMean", "quorum": 1}}


def one_worker_for_all() -> Manifest:
    """Of two members on the one worker."""
    return {**spec_of(URIS, EQUAL, 1), "gateway": {"replicas": 2, "timeout": f"{TIMEOUT_S}s"}}


def lose(ensemble: Ensemble, worker: str) -> None:
    """Have a worker's pod deleted without grace, and wait for the next one of its name."""
    before = ensemble.pods("worker")[worker]["metadata"]["uid"]
    options = ("--wait=false", "--force", "--grace-period=0")
    ensemble.cluster.kubectl("delete", "pod", worker, "-n", ensemble.namespace, *options)

    def is_replaced() -> bool:
        found = ensemble.pods("worker").get(worker)
        return found is not None and found["metadata"]["uid"] != before

    until(is_replaced, BACK_S, "a new worker", ensemble.explanation)


@contextmanager
def no_new_pods(cluster: Cluster) -> Iterator[None]:
    """No node takes another pod: a quick machine would have a new worker within a request's deadline."""
    names = [node["metadata"]["name"] for node in cluster.get("nodes")["items"]]
    try:
        cluster.kubectl("cordon", *names)
        yield
    finally:
        cluster.kubectl("uncordon", *names)


@pytest.mark.parametrize("ensemble", [("quorate", one_worker_each())], indirect=True, ids=["quorum"])
def test_answers_come_by_quorum_while_a_members_only_worker_is_gone(
    ensemble: Ensemble, client: Client, ended: Ended
) -> None:
    held = ensemble.instances()
    assert {member: len(workers) for member, workers in held.items()} == {"two": 1, "four": 1}
    assert held["two"] != held["four"]
    then = client.asked()
    lose(ensemble, *held["two"])
    client.hears(FULL, BACK_S)
    ensemble.settled(len(EQUAL))
    others = factor_of(FACTORS, {"four": 1.0})
    found = ended(then, "a member's only worker deleted, quorum 1", {FULL, others})
    assert not found.harms, found
    assert set(found.factors) == {FULL, others}
    after = client.goes_on()
    assert set(after.factors) == {FULL}, after


@pytest.mark.parametrize("ensemble", [("alone", one_worker_for_all())], indirect=True, ids=["no quorum"])
def test_requests_are_503_within_their_deadline_while_the_only_worker_is_gone(
    ensemble: Ensemble, client: Client, ended: Ended, record: Callable[[str], None]
) -> None:
    [worker] = ensemble.pods("worker")
    then = client.asked()
    with no_new_pods(ensemble.cluster):
        lose(ensemble, worker)
        until(lambda: client.asked().since(then).outcomes["failed"], BACK_S, "a failed request", client.asked)
    client.hears(FULL, BACK_S)
    ensemble.settled(1)
    until(lambda: client.asked().calm_s > 2 * TIMEOUT_S, BACK_S, "no more failures", client.asked)
    found = ended(then, f"the only worker deleted, deadline {TIMEOUT_S} s", {FULL})
    record(f"    statuses {dict(found.statuses)}")
    assert set(found.harms) == {"failed"}, found
    assert set(found.statuses) == {"503"}, found
    assert all("no live instance of" in error for error in found.errors), found
    assert found.slowest_s < TIMEOUT_S + LATE_S, found
    after = client.goes_on()
    assert not after.harms, after
