"""Tests in a cluster with nodes. They run where KUBECONFIG and ENSEMBLE_TEST_IMAGES are set, else are skipped."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.cluster import CHART, RESTRICTED, Cluster
from tests.cluster.serving import Asked, Client, Ended

RECORD = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What tests that passed have to tell too: times, and what became of requests."""
    if config.stash[RECORD]:
        terminalreporter.section("for the record")
        for line in config.stash[RECORD]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line that is printed at the end of the run."""
    return request.config.stash[RECORD].append


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster that the environment names."""
    return Cluster.of(os.environ)


def restricted_namespace(cluster: Cluster, prefix: str) -> str:
    """The name of a new namespace that enforces the Pod Security Standard `restricted`."""
    name = f"{prefix}-{secrets.token_hex(3)}"
    metadata = {"name": name, "labels": RESTRICTED}
    cluster.kubectl("apply", "-f", "-", content={"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    return name


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace that enforces the Pod Security Standard `restricted`; it is gone at the end."""
    name = restricted_namespace(cluster, "ensembles")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@contextmanager
def released(cluster: Cluster, system: str, name: str = "ensembles", *values: str) -> Iterator[None]:
    """A release of the chart in the namespace `system`, which goes with it; `values` as for `--set`."""
    where = ("--namespace", system, "--wait", "--timeout", "120s")
    try:
        cluster.helm("install", name, str(CHART), *where, "--set", ",".join((cluster.chart_values, *values)))
        yield
        cluster.helm("uninstall", name, "--namespace", system, "--wait", "--ignore-not-found")
    finally:
        cluster.kubectl("delete", "namespace", system, "--wait=false")


@pytest.fixture(scope="module")
def system(cluster: Cluster) -> Iterator[str]:
    """The namespace of a release `ensembles` of the chart, with two operators."""
    name = restricted_namespace(cluster, "system")
    with released(cluster, name, "ensembles", "replicas=2"):
        yield name


@pytest.fixture
def ended(client: Client, record: Callable[[str], None]) -> Ended:
    """Called with the tally before a change, its name and the factors allowed in it.

    Tells what became of the requests since, with a hundred after it, and records it. None may be wrong: each answer is
    of all members, at weights that the ensemble has had meanwhile, unless the test allows others.
    """

    def requests_since(then: Asked, what: str, allowed: Collection[str], asking: Client | None = None) -> Asked:
        asked = asking or client
        asked.goes_on()
        found = asked.asked().since(then)
        shown = ", ".join(f"{outcome} {count}" for outcome, count in found.outcomes.items())
        record(f"{what}: {shown}; times the question: {dict(found.factors)}; slowest so far {found.slowest_s:.1f} s")
        for error in found.errors if found.harms else ():
            record(f"    {error}")
        assert not found.outcomes["wrong"], found
        assert set(found.factors) <= set(allowed), found
        return found

    return requests_since
