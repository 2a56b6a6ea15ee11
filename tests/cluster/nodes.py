"""Files of this machine on the nodes' own disks, and claims of them, for clusters with a StorageClass and without."""

from __future__ import annotations

import secrets
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.cluster import Cluster, Manifest, pod

NODE_FOLDER = "/var/tmp"
# A pod that nobody has removed ends by itself.
POD_LIFE_S = 600


@contextmanager
def claim_of_files(cluster: Cluster, namespace: str, claim: str, files: Mapping[str, Path]) -> Iterator[None]:
    """Files and folders of this machine, by their names there, on a claim that pods of every node can mount.

    Every node has them in a folder of the same path; with the claim they are gone.
    """
    unique = f"{claim}-{secrets.token_hex(4)}"
    folder = f"/folder/{unique}"
    # Not the claim's namespace: that one may forbid what reaches a node's disk.
    kind = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": unique}}
    cluster.kubectl("apply", "-f", "-", content=kind)
    try:
        with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
            with tarfile.open(archive.name, "w") as packed:
                for name, path in files.items():
                    packed.add(path, name)
            unpack = f"mkdir -p {folder} && tar -x --no-same-owner -C {folder} && chmod -R a+rX {folder}"
            _on_every_node(cluster, unique, unpack, Path(archive.name))
        for manifest in _volume_and_claim(unique, namespace, claim):
            cluster.apply(manifest, namespace)
        yield
    finally:
        # Nodes may share a disk: then another one's pod may be the first to remove the folder.
        _on_every_node(cluster, unique, f"rm -rf {folder}")
        cluster.kubectl("delete", "persistentvolume", unique, "--wait=false", "--ignore-not-found")
        cluster.kubectl("delete", "namespace", unique, "--wait=false")


def _volume_and_claim(unique: str, namespace: str, claim: str) -> tuple[Manifest, Manifest]:
    size = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    volume = {
        **size,
        "capacity": {"storage": "1Mi"},
        "hostPath": {"path": f"{NODE_FOLDER}/{unique}"},
        "claimRef": {"namespace": namespace, "name": claim},
    }
    request = {**size, "volumeName": unique, "resources": {"requests": {"storage": "1Mi"}}}
    return (
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": unique}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": request},
    )


def _on_every_node(cluster: Cluster, namespace: str, script: str, source: Path | None = None) -> None:
    """Run a shell script as root in a pod on each node, with NODE_FOLDER at /folder and a file as its input."""
    pods = []
    for node in cluster.get("nodes")["items"]:
        name = f"run-{secrets.token_hex(4)}"
        manifest = pod(name, cluster.image("gateway"), ("sleep", str(POD_LIFE_S)))
        manifest["spec"]["nodeName"] = node["metadata"]["name"]
        manifest["spec"]["securityContext"] = {"runAsUser": 0}
        manifest["spec"]["terminationGracePeriodSeconds"] = 0
        manifest["spec"]["containers"][0]["volumeMounts"].append({"name": "folder", "mountPath": "/folder"})
        host: Manifest = {"path": NODE_FOLDER, "type": "DirectoryOrCreate"}
        manifest["spec"]["volumes"].append({"name": "folder", "hostPath": host})
        cluster.apply(manifest, namespace)
        pods.append(name)
    names = [f"pod/{name}" for name in pods]
    cluster.kubectl("wait", *names, "--for=condition=Ready", "--timeout=120s", "-n", namespace, timeout_s=150)
    for name in pods:
        cluster.feed(namespace, name, script, source)
    cluster.kubectl("delete", *names, "--wait=false", "-n", namespace)
