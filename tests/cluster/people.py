"""People of a cluster: each a service account with rights of its own, who asks with its own token."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import Cluster, Manifest

RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who may do what their roles in one namespace say."""

    namespace: str
    kubeconfig: Path

    def create(self, manifest: Manifest, *options: str) -> str:
        """Create an object as this person: what the API server says against it, empty if it is taken."""
        command = ["kubectl", "--kubeconfig", str(self.kubeconfig), "create", "-n", self.namespace, *options, "-f", "-"]
        text = json.dumps(manifest)
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or done.stderr, command
        return "" if done.returncode == 0 else done.stderr


def person(
    cluster: Cluster, namespace: str, name: str, roles: Sequence[str], rules: Sequence[Manifest], folder: Path
) -> Person:
    """Somebody new with these ClusterRoles and rules in the namespace; `folder` is for the kubeconfig."""
    account = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    cluster.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}, namespace)
    role = {"apiVersion": f"{RBAC}/v1", "kind": "Role", "metadata": {"name": name}, "rules": list(rules)}
    cluster.apply(role, namespace)
    for kind, named in (("Role", name), *(("ClusterRole", one) for one in roles)):
        binding = {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": f"{name}-{named}"},
            "roleRef": {"apiGroup": RBAC, "kind": kind, "name": named},
            "subjects": [account],
        }
        cluster.apply(binding, namespace)
    token = cluster.kubectl("create", "token", name, "-n", namespace, "--duration=1h").strip()
    # Ours may hold a client certificate, which would win over a token: only the cluster's address is taken from it.
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    config["users"] = [{"name": name, "user": {"token": token}}]
    config["contexts"] = [{"name": name, "context": {"cluster": config["clusters"][0]["name"], "user": name}}]
    config["current-context"] = name
    kubeconfig = folder / f"{name}.kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    return Person(namespace, kubeconfig)
