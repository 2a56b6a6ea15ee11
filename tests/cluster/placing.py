"""Which nodes the pods of a Deployment are on, which operator leads, and a node that is taken off the network."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.cluster.cluster import Cluster, Manifest, until
from tests.cluster.serving import Ensemble

# Shell commands that take the node $NODE off the network as if its power were gone, and bring it back.
CUT, MEND = "ENSEMBLE_TEST_CUT", "ENSEMBLE_TEST_MEND"
PLACED_S = 180.0


@dataclass(frozen=True, slots=True)
class Replicas:
    """The pods of one Deployment, one for each node."""

    cluster: Cluster
    namespace: str
    selector: str

    def standing(self) -> dict[str, Manifest]:
        """Those that are Ready and not ending, by name."""
        items = self.cluster.get("pods", "-n", self.namespace, "-l", self.selector)["items"]
        return {item["metadata"]["name"]: item for item in items if _stands(item)}

    def nodes(self) -> dict[str, str]:
        """The node of each that stands."""
        return {name: pod["spec"]["nodeName"] for name, pod in self.standing().items()}

    def spread(self, nodes: Sequence[str]) -> None:
        """Have one on each node: of those that share one, one is made anew."""

        def is_spread() -> bool:
            there = self.nodes()
            if len(there) == len(nodes) > len(set(there.values())):
                self.delete(min(there))
                return False
            return len(there) == len(nodes) and set(there.values()) == set(nodes)

        until(is_spread, PLACED_S, f"pods of {self.selector} on {nodes}", self.nodes)

    def delete(self, name: str, *options: str) -> None:
        """Delete a pod without waiting for its end; `options` as for kubectl."""
        self.cluster.kubectl("delete", "pod", name, "-n", self.namespace, "--wait=false", *options)

    def leader(self) -> str:
        """The one that holds a Lease of the namespace; empty if none does."""
        leases = self.cluster.get("leases", "-n", self.namespace)["items"]
        holders = {lease["spec"].get("holderIdentity") for lease in leases}
        return next((name for name in self.standing() if name in holders), "")

    def lead_from(self, node: str) -> None:
        """Have the one on this node lead: another leader is made anew, and leaves it the Lease."""

        def leads() -> bool:
            there, leader = self.nodes(), self.leader()
            if there.get(leader) == node:
                return True
            if leader and node in there.values():
                self.delete(leader)
            return False

        until(leads, PLACED_S, f"a leader on {node}", self.nodes)


def operators(cluster: Cluster, system: str) -> Replicas:
    """The operators of a release in this namespace."""
    return Replicas(cluster, system, "app.kubernetes.io/component=operator")


def gateways(ensemble: Ensemble) -> Replicas:
    """The gateways of an ensemble."""
    selector = f"ensemble-operator.io/ensemble={ensemble.name},app.kubernetes.io/component=gateway"
    return Replicas(ensemble.cluster, ensemble.namespace, selector)


@contextlib.contextmanager
def cut_off(node: str) -> Iterator[None]:
    """The node is gone meanwhile. Skips the test where nothing says how."""
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
    """Whether the cluster takes the node for one that works."""
    conditions = cluster.get("node", node)["status"]["conditions"]
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _stands(pod: Manifest) -> bool:
    conditions = pod["status"].get("conditions", ())
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]
