"""The operator upgraded to another image tag and back while a pod asks without a pause: no request fails.

ENSEMBLE_TEST_NEXT_IMAGES names the images of the other version, as ENSEMBLE_TEST_IMAGES those of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import CHART, TARGETS, Cluster, until
from tests.cluster.serving import Client, Ended, Ensemble, factor_of, serve_models, spec_of, start_client

NEXT = "ENSEMBLE_TEST_NEXT_IMAGES"
FACTORS = {"two": 2.0, "four": 4.0}
URIS = {name: f"http://models:8080/{name}.onnx" for name in FACTORS}
EQUAL = {"two": 1.0, "four": 1.0}
UNEQUAL = {"two": 1.0, "four": 3.0}
BOTH = {factor_of(FACTORS, EQUAL), factor_of(FACTORS, UNEQUAL)}
DEVICES = 2
READY_S = 240.0
ROLLED_S = 240.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def newer(cluster: Cluster) -> Cluster:
    """The cluster with the images of the other version."""
    if NEXT not in os.environ:
        pytest.skip(f"{NEXT} must name a second version of our images in the cluster: REGISTRY:TAG")
    registry, _, tag = os.environ[NEXT].rpartition(":")
    found = Cluster(registry, tag)
    assert all(found.image(target) != cluster.image(target) for target in TARGETS), f"{NEXT} names the same images"
    return found


@pytest.fixture(scope="module")
def ensemble(cluster: Cluster, newer: Cluster, system: str, namespace: str) -> Iterator[Ensemble]:
    """Two members on two devices, each with an instance on both, and two gateways."""
    found = Ensemble(cluster, namespace, "product")
    serve_models(cluster, namespace, FACTORS)
    found.apply(spec_of(URIS, EQUAL, DEVICES))
    found.settled(DEVICES, READY_S)
    yield found
    cluster.kubectl("delete", "inferenceensemble", found.name, "-n", namespace)


@pytest.fixture(scope="module")
def client(ensemble: Ensemble) -> Client:
    """A pod that asks the ensemble and has heard answers."""
    node = ensemble.cluster.get("pod", "models", "-n", ensemble.namespace)["spec"]["nodeName"]
    found = start_client(ensemble, node)
    found.hears(factor_of(FACTORS, EQUAL), 30)
    return found


def operators_image(cluster: Cluster, system: str) -> set[str]:
    """The images of the operators that are not ending."""
    pods = cluster.get("pods", "-n", system, "-l", "app.kubernetes.io/component=operator")["items"]
    return {p["spec"]["containers"][0]["image"] for p in pods if "deletionTimestamp" not in p["metadata"]}


def images_and_uids(ensemble: Ensemble) -> dict[str, tuple[str, str]]:
    """The image and the uid of each of its pods."""
    pods = ensemble.pods().items()
    return {name: (pod["spec"]["containers"][0]["image"], pod["metadata"]["uid"]) for name, pod in pods}


def follows(ensemble: Ensemble, client: Client, weights: dict[str, float]) -> None:
    """See that the operator that acts now does what the resource says."""
    ensemble.apply(spec_of(URIS, weights, DEVICES))
    client.hears(factor_of(FACTORS, weights), 60)
    ensemble.settled(DEVICES)


def upgrade(cluster: Cluster, newer: Cluster, system: str) -> None:
    """Have the operators be those of the other version, if no earlier test has."""
    if operators_image(cluster, system) != {newer.image("operator")}:
        where = ("--namespace", system, "--reset-then-reuse-values", "--wait", "--timeout", "120s")
        cluster.helm("upgrade", "ensembles", str(CHART), *where, "--set", newer.chart_values)
        until(lambda: operators_image(cluster, system) == {newer.image("operator")}, 30, "the newer operators")


def test_an_upgrade_restarts_nothing_and_fails_no_request(
    cluster: Cluster, newer: Cluster, system: str, ensemble: Ensemble, client: Client, ended: Ended
) -> None:
    then, before = client.asked(), images_and_uids(ensemble)
    assert {image for image, _ in before.values()} == {cluster.image("worker"), cluster.image("gateway")}
    upgrade(cluster, newer, system)
    follows(ensemble, client, UNEQUAL)
    found = ended(then, "operator upgraded to another tag", BOTH)
    assert images_and_uids(ensemble) == before
    assert not found.harms, found


def test_the_annotation_rolls_to_the_newer_images_and_fails_no_request(
    cluster: Cluster, newer: Cluster, system: str, ensemble: Ensemble, client: Client, ended: Ended
) -> None:
    upgrade(cluster, newer, system)
    follows(ensemble, client, UNEQUAL)
    then, before = client.asked(), images_and_uids(ensemble)
    target = f"inferenceensemble/{ensemble.name}"
    wish = f"ensemble-operator.io/upgrade={newer.tag}"
    cluster.kubectl("annotate", target, wish, "--overwrite", "-n", ensemble.namespace)

    def rolled() -> bool:
        after = images_and_uids(ensemble)
        uids = {uid for _, uid in before.values()}.isdisjoint(uid for _, uid in after.values())
        images = {image for image, _ in after.values()} == {newer.image("worker"), newer.image("gateway")}
        return uids and images

    until(rolled, ROLLED_S, "all pods of the newer images", ensemble.explanation)
    ensemble.settled(DEVICES)
    found = ended(then, "workers and gateways rolled to another tag", {factor_of(FACTORS, UNEQUAL)})
    assert not found.harms, found


def test_a_rollback_goes_back_and_fails_no_request(
    cluster: Cluster, newer: Cluster, system: str, ensemble: Ensemble, client: Client, ended: Ended
) -> None:
    upgrade(cluster, newer, system)
    then, before = client.asked(), images_and_uids(ensemble)
    cluster.helm("rollback", "ensembles", "1", "--namespace", system, "--wait", "--timeout", "120s")
    until(lambda: operators_image(cluster, system) == {cluster.image("operator")}, 30, "the former operators")
    follows(ensemble, client, EQUAL)
    found = ended(then, "operator rolled back", BOTH)
    assert images_and_uids(ensemble) == before
    assert not found.harms, found
