"""What the children are, where it depends on the resource, the settings or what reconciling has decided."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_operator.api import parse
from ensemble_operator.manifests import (
    GATEWAY,
    PLAN,
    TEMPLATE,
    WORKER,
    Children,
    ChildSettings,
    Manifest,
    child_name,
    children,
    pool_name,
    selector_text,
    worker_tolerations,
)
from ensemble_operator.manifests.amounts import bytes_quantity, cores_quantity
from ensemble_operator.quantities import parse_bytes, parse_cores
from tests.unit.manifests.cases import SETTINGS, UID, inputs, resource


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


def changed(case: str, **spec: Any) -> Children:
    document = resource(case)
    document["spec"] = {**document["spec"], **spec}
    return dataclasses.replace(inputs(case), ensemble=parse(document))


def container(workload: Manifest) -> Manifest:
    return dict(workload["spec"]["template"]["spec"]["containers"][0])


@pytest.mark.parametrize("name", ["a" * 40, "a" + "-" * 38 + "b"])
def test_names_fit_for_the_longest_ensemble_and_every_pool(name: str) -> None:
    """A StatefulSet's revision adds 11 characters to its name, as a label of its pods; ordinals add 5."""
    for pool in range(17):
        assert len(pool_name(name, pool)) <= 63 - 11
    assert max(len(child_name(name, suffix)) for suffix in (WORKER, GATEWAY, PLAN, "profiles")) <= 63 - 11


def test_names_that_would_be_too_long_stay_apart() -> None:
    one, two = child_name("a" * 60, "worker"), child_name("a" * 60, "worker-x1")
    assert one != two
    assert {len(one), len(two)} == {63}


def test_every_pool_needs_a_count() -> None:
    with pytest.raises(ValueError, match="1 counts for 3 pools of pools"):
        dataclasses.replace(inputs("pools"), replicas=(1,))


def test_what_is_left_out_of_the_inputs_is_not_among_the_children() -> None:
    bare = dataclasses.replace(inputs("gpu"), plan=None, profiles=None, worker_secret=None, gateway_secret=None)
    kinds = {m["kind"] for m in children(bare)}
    assert kinds.isdisjoint({"ConfigMap", "Secret"})
    assert {"StatefulSet", "Deployment", "Service", "ServiceAccount", "NetworkPolicy"} <= kinds


def test_pods_come_after_all_that_they_need() -> None:
    kinds = [m["kind"] for m in children(inputs("dra"))]
    assert kinds[-2:] == ["StatefulSet", "Deployment"]


def test_a_single_gateway_may_be_evicted() -> None:
    assert set(of_kind(children(changed("gpu", gateway={"replicas": 1})), "PodDisruptionBudget")) == {"gpu-worker"}
    assert set(of_kind(children(inputs("gpu")), "PodDisruptionBudget")) == {"gpu-worker", "gpu-gateway"}


def test_a_budget_never_asks_for_more_than_one_pod_to_stay() -> None:
    for budget in of_kind(children(inputs("gpu")), "PodDisruptionBudget").values():
        assert budget["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in budget["spec"]


def test_selectors_pick_the_pods_of_their_own_pool_only() -> None:
    sets = of_kind(children(inputs("pools")), "StatefulSet")
    labels = {name: s["spec"]["template"]["metadata"]["labels"] for name, s in sets.items()}
    for name, stateful_set in sets.items():
        wanted = stateful_set["spec"]["selector"]["matchLabels"].items()
        assert [other for other, found in labels.items() if wanted <= found.items()] == [name]
    first = dict(pair.split("=") for pair in selector_text("pools").split(","))
    assert [other for other, found in labels.items() if first.items() <= found.items()] == ["pools-worker"]


def test_a_worker_has_one_device_whatever_the_user_asks_for() -> None:
    sets = of_kind(children(inputs("pools")), "StatefulSet")
    assert container(sets["pools-worker"])["resources"]["limits"] == {"amd.com/gpu": "1"}
    cpu = container(sets["pools-worker-x1"])
    assert cpu["resources"] == {"limits": {"memory": "1536Mi"}, "requests": {"cpu": "1500m", "memory": "1536Mi"}}
    assert cpu["command"][5:12] == ["$(POD_NAME)", "--device", "cpu-0", "--threads", "2", "--memory", "1610612736"]
    claimed = container(sets["pools-worker-x2"])["resources"]
    assert claimed == {"claims": [{"name": "device"}], "requests": {"cpu": "1", "memory": "4Gi"}}
    own = container(of_kind(children(inputs("overrides")), "StatefulSet")["overrides-worker"])
    assert own["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_another_device_class_is_another_claim_and_another_template() -> None:
    """The spec of a ResourceClaimTemplate is immutable, and pods of the former class must be recognised."""
    one = children(inputs("dra"))
    two = children(changed("dra", devices={"count": 2, "deviceClass": "other"}))
    assert set(of_kind(one, "ResourceClaimTemplate")).isdisjoint(of_kind(two, "ResourceClaimTemplate"))
    hashes = {
        of_kind(m, "StatefulSet")["dra-worker"]["spec"]["template"]["metadata"]["annotations"][TEMPLATE]
        for m in (one, two)
    }
    assert len(hashes) == 2


def test_the_plan_and_the_counts_change_no_template() -> None:
    before = of_kind(children(inputs("gpu")), "StatefulSet")["gpu-worker"]
    spec = changed("gpu", gateway={"replicas": 5, "timeout": "9s"}, planning={"strategy": "exact"})
    more = dataclasses.replace(spec, replicas=(9,), plan="{}", uid="other")
    after = of_kind(children(more), "StatefulSet")["gpu-worker"]
    assert after["spec"]["replicas"] == 9
    assert after["spec"]["template"] == before["spec"]["template"]


def test_a_gateway_has_the_time_of_its_longest_request_to_drain() -> None:
    deployment = of_kind(children(changed("gpu", gateway={"timeout": "90s"})), "Deployment")["gpu-gateway"]
    pod = deployment["spec"]["template"]["spec"]
    unpublish_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= unpublish_s + 90


def test_admin_is_open_to_the_operators_namespace_or_to_all_if_it_has_none() -> None:
    for name in ("gpu-worker", "gpu-gateway"):
        rules = of_kind(children(inputs("gpu")), "NetworkPolicy")[name]["spec"]["ingress"]
        peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ensemble-system"}}}
        assert [r["from"] for r in rules if r["ports"][0]["port"] == 8081] == [[peer]]
        outside = dataclasses.replace(inputs("gpu"), settings=ChildSettings("w", "g"))
        rules = of_kind(children(outside), "NetworkPolicy")[name]["spec"]["ingress"]
        assert [r for r in rules if r["ports"][0]["port"] == 8081] == [{"ports": [{"protocol": "TCP", "port": 8081}]}]


def test_pull_secrets_of_the_settings_come_before_the_users_and_none_twice() -> None:
    manifests = children(inputs("overrides"))
    worker = of_kind(manifests, "StatefulSet")["overrides-worker"]["spec"]["template"]["spec"]
    gateway = of_kind(manifests, "Deployment")["overrides-gateway"]["spec"]["template"]["spec"]
    assert worker["imagePullSecrets"] == gateway["imagePullSecrets"] == [{"name": "mirror"}, {"name": "registry"}]
    without = of_kind(children(inputs("gpu")), "Deployment")["gpu-gateway"]["spec"]["template"]["spec"]
    assert "imagePullSecrets" not in without


def test_pods_listen_on_what_the_settings_say() -> None:
    six = dataclasses.replace(SETTINGS, listen_on="[::]")
    manifests = children(inputs("cpu-plain", settings=six))
    worker = container(of_kind(manifests, "StatefulSet")["cpu-plain-worker"])["command"]
    gateway = container(of_kind(manifests, "Deployment")["cpu-plain-gateway"])["command"]
    assert {"tcp://[::]:8081", "tcp://[::]:5555"} <= set(worker)
    assert {"[::]:8000", "tcp://[::]:8081"} <= set(gateway)


def test_overrides_add_and_replace_but_not_what_the_operator_needs() -> None:
    manifests = children(inputs("overrides"))
    template = of_kind(manifests, "StatefulSet")["overrides-worker"]["spec"]["template"]
    pod, metadata = template["spec"], template["metadata"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["state"] == {"name": "state", "emptyDir": {"sizeLimit": "200Gi"}}
    assert "secret" in volumes["keys"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert (mounts["/etc/ensemble/keys"], mounts["/scratch"]) == ("keys", "scratch")
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert (env["HOME"], env["HTTPS_PROXY"]) == ("/scratch", "http://proxy:3128")
    assert metadata["labels"]["app.kubernetes.io/component"] == "worker"
    assert metadata["annotations"][TEMPLATE] != "mine"
    assert pod["nodeSelector"] == {"zone": "a", "gpu": "h100"}
    gateway = container(of_kind(manifests, "Deployment")["overrides-gateway"])
    assert "valueFrom" in gateway["env"][0]


def test_a_users_toleration_of_the_same_taint_replaces_ours() -> None:
    ensemble = inputs("pools").ensemble
    found = worker_tolerations(ensemble, ensemble.spec.extra_devices[0])
    assert [t for t in found if t["key"] == "node.kubernetes.io/unreachable"] == [
        {"key": "node.kubernetes.io/unreachable", "operator": "Exists"}
    ]
    assert [t["tolerationSeconds"] for t in found if t["key"] == "node.kubernetes.io/not-ready"] == [30]


def test_no_right_on_finalizers_is_needed() -> None:
    for manifest in children(inputs("pools")):
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (UID, True, False)


@given(st.integers(0, 1 << 62))
def test_bytes_are_written_exactly(count: int) -> None:
    assert parse_bytes(bytes_quantity(count)) == count


@given(st.integers(1, 10**6))
def test_cores_are_written_exactly(thousandths: int) -> None:
    assert parse_cores(cores_quantity(thousandths / 1000)) == thousandths / 1000
