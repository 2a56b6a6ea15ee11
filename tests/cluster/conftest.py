"""Tests in a cluster with nodes. They run where KUBECONFIG and ENSEMBLE_TEST_IMAGES are set, else are skipped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import CHART, RESTRICTED, Cluster


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster that the environment names."""
    return Cluster.of(os.environ)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace that enforces the Pod Security Standard `restricted`; it is gone at the end."""
    name = f"ensembles-{secrets.token_hex(3)}"
    metadata = {"name": name, "labels": RESTRICTED}
    cluster.kubectl("apply", "-f", "-", content={"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def system(cluster: Cluster) -> Iterator[str]:
    """The namespace of a release `ensembles` of the chart, with two operators."""
    name = f"system-{secrets.token_hex(3)}"
    metadata = {"name": name, "labels": RESTRICTED}
    cluster.kubectl("apply", "-f", "-", content={"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    images = f"images.registry={cluster.registry},images.tag={cluster.tag}"
    where = ("--namespace", name, "--wait", "--timeout", "120s")
    try:
        cluster.helm("install", "ensembles", str(CHART), *where, "--set", f"{images},replicas=2")
        yield name
        cluster.helm("uninstall", "ensembles", "--namespace", name, "--wait", "--ignore-not-found")
    finally:
        cluster.kubectl("delete", "namespace", name, "--wait=false")
