"""Verbs against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ensemble_operator.control.cluster import PAGE_SIZE, Cluster
from ensemble_operator.control.errors import (
    Conflict,
    Forbidden,
    Invalid,
    LeadershipLost,
    NamespaceTerminating,
    NotFound,
)
from ensemble_operator.control.kinds import (
    CHILDREN_SELECTOR,
    CONFIG_MAP,
    ENSEMBLE,
    EVENT,
    POD,
    SECRET,
    SERVICE_ACCOUNT,
    WATCHED,
)
from tests.support.connected import config_map, connected
from tests.support.control_plane import ControlPlane
from tests.support.tiny_operator import make_ensemble

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with connected(control_plane) as found:
        yield found


async def test_apply_makes_keeps_and_changes(cluster: Cluster, control_plane: ControlPlane, namespace: str) -> None:
    made = await cluster.apply(config_map(namespace, "c", a="1"))
    assert "managedFields" not in made["metadata"]
    again = await cluster.apply(config_map(namespace, "c", a="1"))
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    theirs = {"metadata": {"labels": {"team": "a"}}, "data": {"b": "2"}}
    control_plane.ask("PATCH", CONFIG_MAP.path(namespace, "c"), theirs, "application/merge-patch+json")
    changed = await cluster.apply(config_map(namespace, "c", a="3"))
    assert changed["data"] == {"a": "3", "b": "2"}
    assert changed["metadata"]["labels"]["team"] == "a"
    with pytest.raises(Conflict, match="b"):
        await cluster.apply(config_map(namespace, "c", a="3", b="4"), force=False)


async def test_what_is_not_accepted_says_why(cluster: Cluster, namespace: str) -> None:
    for wrong, why in (
        ({**config_map(namespace, "c"), "dta": {}}, r"\.dta: field not declared in schema"),
        ({**config_map(namespace, "c"), "data": {"a": 3}}, "expected string"),
        (config_map(namespace, "C_"), "lowercase RFC 1123"),
    ):
        with pytest.raises(Invalid, match=why):
            await cluster.apply(wrong)
    with pytest.raises(NotFound, match="nowhere"):
        await cluster.apply(config_map("nowhere", "c"))
    with pytest.raises(Invalid, match="is not a kind that is known"):
        await cluster.apply({"apiVersion": "v1", "kind": "Nothing", "metadata": {"name": "x"}})


async def test_create_merge_delete(cluster: Cluster, namespace: str) -> None:
    made = await cluster.create(config_map(namespace, "c", a="1"))
    with pytest.raises(Conflict):
        await cluster.create(config_map(namespace, "c", a="1"))
    merged = await cluster.merge(CONFIG_MAP, namespace, "c", {"data": {"b": "1"}})
    assert merged["data"] == {"a": "1", "b": "1"}
    with pytest.raises(Conflict):
        await cluster.delete(CONFIG_MAP, namespace, "c", uid="another")
    assert await cluster.delete(CONFIG_MAP, namespace, "c", uid=made["metadata"]["uid"])
    assert not await cluster.delete(CONFIG_MAP, namespace, "c")
    assert await cluster.get(CONFIG_MAP, namespace, "c") is None


async def test_status_is_written_apart(cluster: Cluster, control_plane: ControlPlane, namespace: str) -> None:
    make_ensemble(control_plane, namespace, "e", "a")
    report: dict[str, Any] = {
        "apiVersion": ENSEMBLE.api_version,
        "kind": ENSEMBLE.name,
        "metadata": {"name": "e", "namespace": namespace},
        "status": {"phase": "Ready"},
    }
    written = await cluster.apply_status(report)
    assert written["status"]["phase"] == "Ready"
    assert written["metadata"]["generation"] == 1
    with pytest.raises(NotFound):
        await cluster.apply_status({**report, "metadata": {"name": "gone", "namespace": namespace}})


async def test_an_event_twice_is_one_with_a_count(
    cluster: Cluster, control_plane: ControlPlane, namespace: str
) -> None:
    ensemble = make_ensemble(control_plane, namespace, "e", "a")
    for _ in range(3):
        await cluster.event(ensemble, "Warning", "Degraded", "a is lost", "Observe")
    (event,) = await cluster.list(EVENT, namespace)
    assert (event["reason"], event["note"], event["series"]["count"]) == ("Degraded", "a is lost", 3)
    assert event["regarding"]["uid"] == ensemble["metadata"]["uid"]
    await cluster.delete(EVENT, namespace, event["metadata"]["name"])
    await cluster.event(ensemble, "Warning", "Degraded", "a is lost", "Observe")
    assert len(await cluster.list(EVENT, namespace)) == 1


async def test_nothing_is_changed_without_leave(cluster: Cluster, namespace: str) -> None:
    await cluster.apply(config_map(namespace, "c"))

    def refuse() -> None:
        raise LeadershipLost("not now")

    cluster.guard = refuse
    for change in (
        cluster.apply(config_map(namespace, "d")),
        cluster.create(config_map(namespace, "d")),
        cluster.delete(CONFIG_MAP, namespace, "c"),
        cluster.merge(CONFIG_MAP, namespace, "c", {"data": {}}),
    ):
        with pytest.raises(LeadershipLost):
            await change
    assert await cluster.get(CONFIG_MAP, namespace, "c") is not None
    assert await cluster.get(CONFIG_MAP, namespace, "d") is None


async def test_a_namespace_that_is_going_is_named_as_such(
    cluster: Cluster, control_plane: ControlPlane, namespace: str
) -> None:
    """A finalizer keeps it Terminating."""
    path = f"/api/v1/namespaces/{namespace}"

    def finalize(*names: str) -> None:
        patch = {"metadata": {"finalizers": list(names)}}
        control_plane.ask("PATCH", path, patch, "application/merge-patch+json")

    finalize("tests.example.com/keep")
    control_plane.ask("DELETE", path)
    try:
        with pytest.raises(NamespaceTerminating, match="being terminated"):
            await cluster.create(config_map(namespace, "c"))
    finally:
        finalize()


async def test_a_missing_rule_is_named(control_plane: ControlPlane, namespace: str) -> None:
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}]
    kubeconfig = control_plane.kubeconfig_for("weak", rules, namespace=namespace, narrow=True)
    weak = await Cluster.connect(kubeconfig)
    try:
        assert await weak.get(CONFIG_MAP, namespace, "c") is None
        with pytest.raises(Forbidden, match=r'may not get secrets .*resources: \["secrets"\], verbs: \["get"\]'):
            await weak.get(SECRET, namespace, "s")
        with pytest.raises(Forbidden, match="may not list pods in the whole cluster"):
            await weak.list(POD)
    finally:
        await weak.close()


async def test_long_lists_come_in_pages(cluster: Cluster, namespace: str) -> None:
    count = PAGE_SIZE + 20
    await asyncio.gather(*(cluster.create(config_map(namespace, f"c{n}", a="1")) for n in range(count)))
    pages = [items async for items, _ in cluster.pages(CONFIG_MAP, namespace, CHILDREN_SELECTOR)]
    assert [len(page) for page in pages] == [PAGE_SIZE, 20]
    assert {item["kind"] for page in pages for item in page} == {"ConfigMap"}
    brief = await cluster.list(CONFIG_MAP, namespace, metadata_only=True)
    assert len(brief) >= count
    assert not any("data" in item for item in brief)
    one = await cluster.list(CONFIG_MAP, namespace, fields="metadata.name=c7", newest=False)
    assert [item["metadata"]["name"] for item in one] == ["c7"]


async def test_kinds_are_what_the_server_serves(control_plane: ControlPlane) -> None:
    """Plural, version and scope are written down, not asked for."""
    for kind in (*WATCHED, ENSEMBLE, SECRET, EVENT, SERVICE_ACCOUNT):
        path = kind.path().rsplit("/", 1)[0]
        served = {r["name"]: r for r in control_plane.ask("GET", path)["resources"]}
        assert (served[kind.plural]["kind"], served[kind.plural]["namespaced"]) == (kind.name, kind.namespaced)
