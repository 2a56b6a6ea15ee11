"""The API server takes the children as they are: valid, settled after one apply, and fit for restricted namespaces."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from ensemble_operator.manifests import ENSEMBLE_LABEL, WORKER, Manifest, children
from tests.support.control_plane import ControlPlane, Refused
from tests.support.kube_client import KubeClient, shown
from tests.unit.manifests.cases import SPECS, inputs, resource

# No deletion and no rights on finalizers: owner references must be settable without.
RULES = [
    {"apiGroups": [group], "resources": resources, "verbs": ["get", "create", "patch"]}
    for group, resources in (
        ("", ["configmaps", "secrets", "services", "serviceaccounts"]),
        ("apps", ["statefulsets", "deployments"]),
        ("networking.k8s.io", ["networkpolicies"]),
        ("policy", ["poddisruptionbudgets"]),
        ("resource.k8s.io", ["resourceclaimtemplates"]),
    )
]
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


@pytest.fixture
async def admin(control_plane: ControlPlane) -> AsyncIterator[KubeClient]:
    async with KubeClient(control_plane.kubeconfig) as client:
        yield client


@pytest.fixture
def restricted(control_plane: ControlPlane) -> Iterator[str]:
    name = control_plane.new_namespace("restricted", RESTRICTED)
    yield name
    control_plane.ask("DELETE", f"/api/v1/namespaces/{name}")


async def made(admin: KubeClient, case: str, namespace: str) -> tuple[Manifest, ...]:
    """The children of a case whose resource is really there."""
    owner = await admin.create(resource(case, namespace))
    return children(inputs(case, namespace, owner["metadata"]["uid"]))


@pytest.mark.parametrize("case", SPECS)
async def test_one_apply_settles(case: str, control_plane: ControlPlane, admin: KubeClient, namespace: str) -> None:
    """With strict validation, under a role without further rights; a second apply does not even write."""
    kubeconfig = control_plane.kubeconfig_for("applier", RULES, namespace=namespace)
    manifests = await made(admin, case, namespace)
    async with KubeClient(kubeconfig) as kube:
        for manifest in manifests:
            await kube.apply(manifest, "ensemble-operator")
        for manifest in manifests:
            assert await is_settled(kube, manifest), shown(manifest)


async def is_settled(kube: KubeClient, manifest: Manifest) -> bool:
    """Whether an apply writes nothing; controllers may write between a look and an apply, but not each time."""
    metadata = manifest["metadata"]
    for _ in range(10):
        live = await kube.get(manifest["kind"], metadata["namespace"], metadata["name"])
        after = await kube.apply(manifest, "ensemble-operator")
        if live is not None and live["metadata"]["resourceVersion"] == after["metadata"]["resourceVersion"]:
            return True
        await asyncio.sleep(0.1)
    return False


@pytest.mark.parametrize("case", SPECS)
async def test_what_was_applied_is_what_is_there(case: str, admin: KubeClient, namespace: str) -> None:
    """No field is dropped, defaulted over or written in another form."""
    for manifest in await made(admin, case, namespace):
        live = await admin.apply(manifest, "ensemble-operator")
        assert list(differences(manifest, live)) == []


@pytest.mark.parametrize("case", SPECS)
async def test_pods_are_admitted_where_restricted_is_enforced(
    case: str, control_plane: ControlPlane, admin: KubeClient, restricted: str
) -> None:
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "x"}
    path = "/apis/node.k8s.io/v1/runtimeclasses/nvidia?fieldManager=tests"
    control_plane.ask("PATCH", path, runtime, "application/apply-patch+yaml")
    manifests = await made(admin, case, restricted)
    for manifest in manifests:
        await admin.apply(manifest, "ensemble-operator")
    workloads = [m for m in manifests if m["kind"] in ("StatefulSet", "Deployment")]
    assert workloads
    for workload in workloads:
        template = copy.deepcopy(workload["spec"]["template"])
        template["metadata"] |= {"name": workload["metadata"]["name"], "namespace": restricted}
        await admin.create({"apiVersion": "v1", "kind": "Pod", **template})


async def test_restricted_is_enforced(admin: KubeClient, restricted: str) -> None:
    manifests = await made(admin, "gpu", restricted)
    for manifest in manifests:
        await admin.apply(manifest)
    template = copy.deepcopy(next(m for m in manifests if m["kind"] == "StatefulSet")["spec"]["template"])
    template["metadata"] |= {"name": "loose", "namespace": restricted}
    del template["spec"]["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(Refused, match="unrestricted capabilities"):
        await admin.create({"apiVersion": "v1", "kind": "Pod", **template})


async def test_a_service_can_change_its_type_and_back(admin: KubeClient, namespace: str) -> None:
    (service,) = [m for m in await made(admin, "gpu", namespace) if m["metadata"]["name"] == "gpu"]
    for kind in ("LoadBalancer", "ClusterIP", "NodePort", "ClusterIP"):
        live = await admin.apply({**service, "spec": {**service["spec"], "type": kind}}, "ensemble-operator")
        assert live["spec"]["type"] == kind
        assert ("nodePort" in live["spec"]["ports"][0]) == (kind != "ClusterIP")


async def test_controllers_make_the_pods_and_children_go_with_their_owner(
    control_plane: ControlPlane, admin: KubeClient, namespace: str
) -> None:
    control_plane.start_controllers()
    for manifest in await made(admin, "pools", namespace):
        await admin.apply(manifest, "ensemble-operator")
    selected = f"{ENSEMBLE_LABEL}=pools,app.kubernetes.io/component={WORKER}"
    for name in ("pools-worker-0", "pools-worker-1", "pools-worker-x1-0", "pools-worker-x2-2"):
        pod = await admin.wait_for("Pod", namespace, name, lambda p: p is not None)
        assert pod is not None
        assert pod["spec"]["hostname"] == name
    async with asyncio.timeout(60):
        while len(await admin.list("Pod", namespace, labelSelector=selected)) != 6:
            await asyncio.sleep(0.1)
    await admin.delete("InferenceEnsemble", namespace, "pools")
    for kind, name in (("StatefulSet", "pools-worker"), ("Secret", "pools-gateway"), ("ConfigMap", "pools-plan")):
        await admin.wait_for(kind, namespace, name, lambda found: found is None, 60)


def differences(wanted: Any, live: Any, at: str = "") -> list[str]:
    """Where the live object does not say what was applied; what it says besides is the API server's."""
    if isinstance(wanted, dict) and isinstance(live, dict):
        return [d for key, value in wanted.items() for d in differences(value, live.get(key), f"{at}.{key}")]
    if isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        return [
            d for index, pair in enumerate(zip(wanted, live, strict=True)) for d in differences(*pair, f"{at}[{index}]")
        ]
    return [] if wanted == live else [f"{at}: {live!r}, not {wanted!r}"]
