"""The operator under exactly its role: it suffices for an ensemble's whole life, and a rule that is gone is named."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble_contract.pod import TOKEN_FILE
from ensemble_operator.api import parse
from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import ClusterError, Conflict, Forbidden
from ensemble_operator.control.kinds import ENSEMBLE, KINDS, LEASE, SECRET, Kind, Manifest, kind_of
from ensemble_operator.control.rbac import Rule, own_rules, rules
from ensemble_operator.manifests import Children, ChildSettings, children
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import KubeClient
from tests.support.models import export_mlp
from tests.support.operating import Operating, member, operating, resource

# How long the API server takes to notice that a role has changed.
NOTICED_S = 60.0
PATCH_DEPLOYMENTS: Rule = {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["patch"]}
IMAGES = ChildSettings(worker_image="worker:test", gateway_image="gateway:test")

pytestmark = pytest.mark.timeout(300)

Attempt = Callable[[Cluster], Awaitable[Any]]


def without(granted: list[Rule], resource: str, verb: str) -> list[Rule]:
    """The rules without one verb on one resource."""
    kept = [
        {**rule, "verbs": [v for v in rule["verbs"] if (rule["resources"][0], v) != (resource, verb)]}
        for rule in granted
    ]
    return [rule for rule in kept if rule["verbs"]]


def verbs_of(granted: list[Rule]) -> list[tuple[str, str]]:
    return [(rule["resources"][0], verb) for rule in granted for verb in rule["verbs"]]


def refused(world: Operating) -> dict[Any, int]:
    assert world.cluster is not None
    return {call: count for call, count in world.cluster.request_counts.items() if call[2] in (401, 403)}


async def test_the_role_suffices_from_apply_to_deletion(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """Ready, scaled, with another pool, another pod template, another key, restarted, gone: never a refusal."""
    a, b = (member(name, export_mlp(tmp_path / f"{name}.pt2", seed=seed)) for seed, name in enumerate("ab"))
    granted = rules(cluster_wide=False) + own_rules()
    kubeconfig = control_plane.kubeconfig_for("operator", granted, namespace=namespace, narrow=True)
    pool = {"count": 1, "resource": "cpu", "cores": "500m", "memory": "1Gi"}
    async with operating(control_plane, namespace, start=False, allow_overrides=True) as world:
        await world.start_operator(kubeconfig)
        await world.apply(resource("tiny", [a, b], devices=pool, rollout="Pause"))
        await world.until_ready("tiny")
        await world.apply(resource("tiny", [a, b], extraDevices=[pool], gateway={"replicas": 2}))
        await world.until("tiny", lambda status: status["devices"]["summary"] == "3/3")
        await world.until_ready("tiny")
        red = {"worker": {"labels": {"team": "red"}}, "gateway": {"labels": {"team": "red"}}}
        await world.apply(resource("tiny", [a, b], devices=pool, podTemplate=red, rollout="Pause"))
        await until_pods(world, lambda labels: labels.get("team") == "red", 2)
        await world.until_ready("tiny")
        assert refused(world) == {}
        await world.end_operator()

        wrong = {"data": {TOKEN_FILE: base64.b64encode(b"another").decode()}}
        await world.kube.patch("Secret", namespace, "tiny-gateway", wrong)
        await world.start_operator(kubeconfig)
        await world.kube.wait_for("Secret", namespace, "tiny-gateway", lambda s: (s or wrong)["data"] != wrong["data"])
        await world.until_ready("tiny")
        await world.kube.delete("InferenceEnsemble", namespace, "tiny")
        await until_pods(world, lambda labels: True, 0)
        assert refused(world) == {}


async def until_pods(world: Operating, wanted: Callable[[Mapping[str, str]], bool], count: int) -> None:
    """Wait until the namespace has so many pods, all of them as wanted."""
    deadline = time.monotonic() + 120
    while True:
        pods = await world.kube.list("Pod", world.namespace)
        labels = [pod["metadata"].get("labels", {}) for pod in pods]
        if len(labels) == count and all(wanted(found) for found in labels):
            return
        assert time.monotonic() < deadline, labels
        await asyncio.sleep(0.1)


async def test_the_whole_cluster_is_looked_at_for_free_devices(control_plane: ControlPlane, namespace: str) -> None:
    """With rights in the whole cluster the operator lists nodes, pods and published devices, and no rule lacks."""
    kubeconfig = control_plane.kubeconfig_for("wide", rules() + own_rules(), namespace=namespace)
    model = {"name": "a", "model": {"uri": "file:///models/a.pt2"}}
    hungry = resource("hungry", [model], devices={"count": 900, "resource": "nvidia.com/gpu"})
    async with operating(control_plane, namespace, start=False) as world:
        world.settings = replace(world.settings, namespace="")
        await world.start_operator(kubeconfig)
        await world.apply(hungry)
        await world.until("hungry", lambda status: "nvidia.com/gpu" in str(status.get("conditions", "")))
        await until_listed(world, "nodes", "resourceslices")
        assert refused(world) == {}


async def until_listed(world: Operating, *plurals: str) -> None:
    deadline = time.monotonic() + 60
    assert world.cluster is not None
    while not all(world.cluster.request_counts.get(("list", plural, 200)) for plural in plurals):
        assert time.monotonic() < deadline, world.cluster.request_counts
        await asyncio.sleep(0.1)


async def test_a_reconcile_without_a_rule_says_so_and_goes_on_with_it(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    a = member("a", export_mlp(tmp_path / "a.pt2", seed=0))
    granted = rules(cluster_wide=False) + own_rules()

    def role(rules_now: list[Rule]) -> Path:
        return control_plane.kubeconfig_for("operator", rules_now, namespace=namespace, narrow=True)

    kubeconfig = role(without(granted, "deployments", "patch"))
    async with operating(control_plane, namespace, start=False) as world:
        await world.start_operator(kubeconfig)
        await world.apply(resource("tiny", [a]))
        status = await world.until("tiny", lambda s: condition(s, "Degraded").get("reason") == "Forbidden")
        wanted = f"the operator may not patch deployments in namespace '{namespace}': add to its role the rule"
        assert wanted in condition(status, "Degraded")["message"]
        told = await world.until_told("tiny", "Degraded")
        assert [reason for reason, note in told if wanted in note] == ["Degraded"]
        role(granted)
        await asyncio.to_thread(control_plane.wait_permitted, kubeconfig, PATCH_DEPLOYMENTS, namespace)
        await world.apply({**resource("tiny", [a]), "metadata": {"name": "tiny", "annotations": {"again": "1"}}})
        await world.until_ready("tiny")


def condition(status: Mapping[str, Any], type_: str) -> dict[str, Any]:
    return next((c for c in status.get("conditions", ()) if c["type"] == type_), {})


class Verbs:
    """What the operator does with each verb of its role, as attempts that change nothing that lasts."""

    def __init__(self, namespace: str, ensemble: Manifest) -> None:
        self._namespace, self._ensemble = namespace, ensemble
        parsed, uid = parse(ensemble), ensemble["metadata"]["uid"]
        contents = {"admin.token": "secret"}
        made = children(Children(parsed, uid, IMAGES, (0,), contents, contents, "{}", {}, {}))
        self._manifests = {kind_of(manifest).plural: manifest for manifest in made}
        self._kinds: dict[str, Kind] = {kind.plural: kind for kind in KINDS}
        self._events = 0

    def manifests(self) -> list[Manifest]:
        """One child of each kind."""
        return list(self._manifests.values())

    def attempt(self, resource: str, verb: str) -> Attempt:
        """An attempt that needs just this verb, besides those which are always granted with it."""
        special: dict[tuple[str, str], Attempt] = {
            ("inferenceensembles/status", "patch"): self._apply_status,
            ("events", "create"): self._tell,
            ("events", "patch"): self._tell_twice,
            ("leases", "get"): lambda cluster: cluster.read_lease(self._namespace, "ensemble-operator", 5),
            ("leases", "create"): lambda cluster: cluster.write_lease(self._lease(), 5),
            ("leases", "update"): self._renew,
            ("secrets", "create"): lambda cluster: cluster.create(self._manifests["secrets"]),
        }
        if (resource, verb) in special:
            return special[resource, verb]
        kind = self._kinds[resource]
        where = self._namespace if kind.namespaced else None
        general: dict[str, Attempt] = {
            "get": lambda cluster: cluster.get(kind, where, "nothing"),
            "list": lambda cluster: cluster.list(kind, where),
            "watch": lambda cluster: self._watch(cluster, kind),
            "delete": lambda cluster: cluster.delete(kind, where, "nothing"),
            "patch": lambda cluster: cluster.apply(self._manifests[resource]),
            "create": lambda cluster: cluster.apply(self._renamed(resource)),
        }
        return general[verb]

    async def _watch(self, cluster: Cluster, kind: Kind) -> None:
        async for _ in cluster.watch(kind, self._namespace, "", "0", 5):
            return

    def _renamed(self, resource: str) -> Manifest:
        manifest = self._manifests[resource]
        name = f"other-{time.monotonic_ns()}"
        return {**manifest, "metadata": {**manifest["metadata"], "name": name}}

    def _lease(self, version: str = "") -> Manifest:
        metadata = {"namespace": self._namespace, "name": "ensemble-operator"}
        if version:
            metadata["resourceVersion"] = version
        return {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": metadata, "spec": {}}

    async def _renew(self, cluster: Cluster) -> None:
        await cluster.write_lease(self._lease("1"), 5)

    async def _apply_status(self, cluster: Cluster) -> None:
        metadata = {"namespace": self._namespace, "name": self._ensemble["metadata"]["name"]}
        status = {"phase": "Acquiring"}
        await cluster.apply_status(
            {"apiVersion": ENSEMBLE.api_version, "kind": ENSEMBLE.name, "metadata": metadata, "status": status}
        )

    async def _tell(self, cluster: Cluster) -> None:
        self._events += 1
        await cluster.event(self._ensemble, "Normal", "Ready", f"for the {self._events}th time", "Report")

    async def _tell_twice(self, cluster: Cluster) -> None:
        await self._tell(cluster)
        self._events -= 1
        await self._tell(cluster)


@pytest.fixture
async def verbs(control_plane: ControlPlane, namespace: str) -> AsyncIterator[Verbs]:
    """An ensemble that nobody reconciles, with a child of each kind."""
    devices = {"count": 1, "deviceClass": "gpu.example.com"}
    model = {"name": "a", "model": {"uri": "file:///models/a.pt2"}}
    wanted = resource("tiny", [model], devices=devices)
    async with KubeClient(control_plane.kubeconfig) as kube:
        made = await kube.apply({**wanted, "metadata": {"name": "tiny", "namespace": namespace}})
        found = Verbs(namespace, made)
        for manifest in found.manifests():
            await kube.apply(manifest, manager="ensemble-operator")
        yield found


async def test_each_verb_that_is_taken_from_the_role_is_named(
    control_plane: ControlPlane, namespace: str, verbs: Verbs
) -> None:
    """With all of them every attempt succeeds, or fails for another reason; without one, that one is asked for."""
    granted = rules() + own_rules()
    cluster = await Cluster.connect(control_plane.kubeconfig_for("operator", granted, namespace=namespace))
    try:
        for resource_name, verb in verbs_of(granted):
            attempt = verbs.attempt(resource_name, verb)
            await until_permitted(cluster, attempt)
            control_plane.kubeconfig_for("operator", without(granted, resource_name, verb), namespace=namespace)
            error = await until_forbidden(cluster, attempt)
            assert (error.verb, error.resource) == (verb, resource_name)
            wanted = f'resources: ["{resource_name}"], verbs: ["{verb}"]'
            assert wanted in str(error)
            control_plane.kubeconfig_for("operator", granted, namespace=namespace)
    finally:
        await cluster.close()


async def test_secrets_are_never_listed_nor_watched(control_plane: ControlPlane, namespace: str) -> None:
    kubeconfig = control_plane.kubeconfig_for("operator", rules() + own_rules(), namespace=namespace)
    cluster = await Cluster.connect(kubeconfig)
    try:
        with pytest.raises(Forbidden, match="may not list secrets"):
            await cluster.list(SECRET, namespace)
        assert ("secrets", "watch") not in verbs_of(rules())
    finally:
        await cluster.close()


async def until_permitted(cluster: Cluster, attempt: Attempt) -> None:
    deadline = time.monotonic() + NOTICED_S
    while True:
        try:
            await attempt(cluster)
        except Forbidden:
            assert time.monotonic() < deadline, "the full role is not enough"
            await asyncio.sleep(0.05)
        except Conflict:
            # It is there already, or has another version: RBAC had no objection.
            return
        else:
            return


async def until_forbidden(cluster: Cluster, attempt: Attempt) -> Forbidden:
    deadline = time.monotonic() + NOTICED_S
    while time.monotonic() < deadline:
        try:
            await attempt(cluster)
        except Forbidden as error:
            return error
        except ClusterError:
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("a verb that was taken away is not missed")
