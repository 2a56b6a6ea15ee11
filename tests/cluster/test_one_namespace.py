"""The chart with `watchNamespace`: it serves that namespace by a Role there, and has no rights in the cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, until
from tests.cluster.conftest import released, restricted_namespace
from tests.cluster.serving import Ensemble, spec_of

RELEASE = "narrow"
SPEC = spec_of({"two": "http://models:8080/two.onnx"}, {"two": 1.0}, 1)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def narrow(cluster: Cluster, namespace: str) -> Iterator[str]:
    """The namespace of a release that serves another one."""
    system = restricted_namespace(cluster, "system")
    with released(cluster, system, RELEASE, f"watchNamespace={namespace}", "rbac.aggregate=false"):
        yield system


def test_it_serves_its_namespace(cluster: Cluster, namespace: str, narrow: str) -> None:
    said = cluster.helm("test", RELEASE, "--namespace", narrow, "--timeout", "200s", timeout_s=220)
    assert "Succeeded" in said
    until(lambda: not cluster.get("ie", "-n", namespace)["items"], 30, "the tested ensemble is gone")


def test_it_has_no_rights_elsewhere(cluster: Cluster, narrow: str) -> None:
    roles = cluster.get("clusterroles,clusterrolebindings")["items"]
    assert not [role for role in roles if role["metadata"]["name"].startswith(narrow)]
    account = f"system:serviceaccount:{narrow}:{RELEASE}-ensemble-operator"
    for question in (("list", "pods"), ("get", "secrets"), ("list", "nodes")):
        said = cluster.kubectl("auth", "can-i", *question, "--as", account, "-n", narrow, check=False)
        assert said.strip() == "no", question


def test_other_namespaces_are_left_alone(cluster: Cluster, namespace: str, narrow: str) -> None:
    elsewhere = Ensemble(cluster, narrow, "elsewhere")
    here = Ensemble(cluster, namespace, "here")
    elsewhere.apply(SPEC)
    here.apply(SPEC)
    until(here.status, 60, "the operator has looked at the later one")
    assert not elsewhere.status()
    assert not elsewhere.pods()
