"""Verbs, watches and the store against a real API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ensemble_operator.control.cluster import PAGE_SIZE, Cluster
from ensemble_operator.control.ensembles import Ensembles
from ensemble_operator.control.errors import (
    Conflict,
    Forbidden,
    Invalid,
    LeadershipLost,
    NamespaceTerminating,
    NotFound,
    Unavailable,
)
from ensemble_operator.control.kinds import (
    CHILDREN_SELECTOR,
    CONFIG_MAP,
    ENSEMBLE,
    ENSEMBLE_LABEL,
    EVENT,
    FIELD_MANAGER,
    MANAGED_BY,
    POD,
    SECRET,
    SERVICE_ACCOUNT,
    WATCHED,
    Key,
    Manifest,
)
from ensemble_operator.control.store import Store
from ensemble_operator.control.watches import Watches
from tests.support.control_plane import ControlPlane
from tests.support.tiny_operator import make_ensemble


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    connected = await Cluster.connect(control_plane.kubeconfig)
    async with asyncio.timeout(100):
        yield connected
    await connected.close()


def config_map(namespace: str, name: str, owner: str = "e", **data: str) -> Manifest:
    labels = {MANAGED_BY: FIELD_MANAGER, ENSEMBLE_LABEL: owner}
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


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


async def test_create_update_merge_delete(cluster: Cluster, namespace: str) -> None:
    made = await cluster.create(config_map(namespace, "c", a="1"))
    with pytest.raises(Conflict):
        await cluster.create(config_map(namespace, "c", a="1"))
    updated = await cluster.update({**made, "data": {"a": "2"}})
    assert updated["data"] == {"a": "2"}
    with pytest.raises(Conflict):
        await cluster.update({**made, "data": {"a": "3"}})
    merged = await cluster.merge(CONFIG_MAP, namespace, "c", {"data": {"b": "1"}})
    assert merged["data"] == {"a": "2", "b": "1"}
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
    """Nobody finalizes namespaces here: it stays Terminating."""
    control_plane.ask("DELETE", f"/api/v1/namespaces/{namespace}")
    with pytest.raises(NamespaceTerminating, match="being terminated"):
        await cluster.create(config_map(namespace, "c"))


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


class Follower:
    """Watches of one namespace, and whom they woke."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.store, self.woken = Store(), list[Key]()
        self.doubts = 0
        self.watches = Watches(cluster, self.store, self.woken.append, namespace=namespace, on_doubt=self._doubt)

    def _doubt(self) -> None:
        self.doubts += 1

    async def until(self, holds: Any, deadline_s: float = 20.0) -> float:
        """Wait until something holds; how long that took."""
        began = time.monotonic()
        async with asyncio.timeout(deadline_s):
            while not holds():
                await asyncio.sleep(0.02)
        return time.monotonic() - began


def versions(items: list[Manifest]) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["resourceVersion"] for item in items}


def known(follower: Follower, namespace: str) -> dict[str, str]:
    """All ConfigMaps that the store has, of the ten ensembles."""
    found = [item for n in range(10) for item in follower.store.children(CONFIG_MAP, Key(namespace, f"e{n}"))]
    return versions(found)


async def test_a_store_follows_a_thousand_objects(cluster: Cluster, namespace: str) -> None:
    follower = Follower(cluster, namespace)
    names = [f"c{n}" for n in range(1_000)]
    owners = {name: f"e{n % 10}" for n, name in enumerate(names)}
    await asyncio.gather(*(cluster.create(config_map(namespace, n, owners[n], a="1")) for n in names[:500]))
    following = asyncio.create_task(follower.watches.run())
    try:
        await follower.watches.synced()
        assert len(known(follower, namespace)) == 500
        await asyncio.gather(
            *(cluster.create(config_map(namespace, n, owners[n], a="1")) for n in names[500:]),
            *(cluster.apply(config_map(namespace, n, owners[n], a="2")) for n in names[:100]),
            *(cluster.delete(CONFIG_MAP, namespace, n) for n in names[100:200]),
        )
        await cluster.create({**config_map(namespace, "not-ours"), "metadata": {"name": "x", "namespace": namespace}})
        wanted = versions(await cluster.list(CONFIG_MAP, namespace, CHILDREN_SELECTOR))
        assert len(wanted) == 900
        lag_s = await follower.until(lambda: known(follower, namespace) == wanted)
        assert lag_s < 5
        assert follower.store.count(CONFIG_MAP) == 900
        assert set(follower.woken) == {Key(namespace, f"e{n}") for n in range(10)}
        assert follower.watches.problems() == []
        assert follower.watches.stuck() == []
        assert follower.watches.relists["configmaps"] == 1
        assert follower.doubts == 0
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_what_wakes_and_what_does_not(cluster: Cluster, control_plane: ControlPlane, namespace: str) -> None:
    """A pod's readiness does; our own writes, once noted, and other people's objects do not."""
    follower = Follower(cluster, namespace)
    cluster.on_written = follower.store.note_written
    following = asyncio.create_task(follower.watches.run())
    key = Key(namespace, "e")
    try:
        await follower.watches.synced()
        written = await cluster.apply(config_map(namespace, "plan", a="1"))
        assert follower.store.child(CONFIG_MAP, key, "plan") == written
        labels = {MANAGED_BY: FIELD_MANAGER, ENSEMBLE_LABEL: "e"}
        spec = {"containers": [{"name": "worker", "image": "worker"}]}
        pod = {"metadata": {"name": "p", "labels": labels}, "spec": spec}
        control_plane.ask("POST", POD.path(namespace), pod)
        await follower.until(lambda: follower.store.child(POD, key, "p"))
        assert set(follower.woken) == {key}
        follower.woken.clear()
        ready = {"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}}
        status = POD.path(namespace, "p", "status")
        control_plane.ask("PATCH", status, ready, "application/merge-patch+json")
        await follower.until(lambda: follower.woken)
        assert follower.woken == [key]
        control_plane.ask("DELETE", POD.path(namespace, "p"), {"gracePeriodSeconds": 0})
        await follower.until(lambda: not follower.store.children(POD, key))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.slow
async def test_a_store_is_right_again_after_an_outage_and_compaction(own_plane: ControlPlane) -> None:
    namespace = own_plane.new_namespace()
    cluster = await Cluster.connect(own_plane.kubeconfig)
    follower = Follower(cluster, namespace)
    following = asyncio.create_task(follower.watches.run())
    try:
        await follower.watches.synced()
        names = [f"c{n}" for n in range(50)]
        await asyncio.gather(*(cluster.create(config_map(namespace, n, "e1", a="1")) for n in names))
        await follower.until(lambda: len(known(follower, namespace)) == 50)
        own_plane.kill_api_server()
        await follower.until(lambda: len(follower.watches.problems()) == len(WATCHED))
        with pytest.raises(Unavailable, match="get configmaps"):
            await cluster.get(CONFIG_MAP, namespace, "c0")
        # In this thread, with whose end the server would end; the watches stand still meanwhile, and what changes
        # before they are back is beyond the compaction.
        own_plane.start_api_server()
        await asyncio.gather(*(cluster.delete(CONFIG_MAP, namespace, n) for n in names[:20]))
        await cluster.apply(config_map(namespace, "c30", "e1", a="2"))
        own_plane.compact()
        wanted = versions(await cluster.list(CONFIG_MAP, namespace, CHILDREN_SELECTOR))
        assert await follower.until(lambda: known(follower, namespace) == wanted) < 8
        await follower.until(lambda: follower.watches.problems() == [])
        assert follower.doubts >= 1
        assert follower.watches.stuck() == []
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await cluster.close()


async def test_what_kopf_missed_is_found(cluster: Cluster, control_plane: ControlPlane, namespace: str) -> None:
    store, woken = Store(), list[Key]()
    for name in ("same", "edited", "goes", "replaced"):
        make_ensemble(control_plane, namespace, name, "a")
    ensembles = Ensembles(cluster, store, woken.append, namespace)
    await ensembles.list()
    await ensembles.certain()
    assert len(woken) == 4
    woken.clear()
    assert await ensembles.compare() == 0
    make_ensemble(control_plane, namespace, "edited", "a", "b")
    make_ensemble(control_plane, namespace, "came", "a")
    for name in ("goes", "replaced"):
        control_plane.ask("DELETE", ENSEMBLE.path(namespace, name))
    make_ensemble(control_plane, namespace, "replaced", "a")
    assert await ensembles.compare() == 4
    assert {key.name for key in woken} == {"edited", "came", "goes", "replaced"}
    assert store.ensemble(Key(namespace, "goes")) is None
    edited = store.ensemble(Key(namespace, "edited"))
    assert edited is not None
    assert len(edited["spec"]["members"]) == 2
    assert await ensembles.compare() == 0


async def test_a_watch_that_is_silent_is_noticed(cluster: Cluster, control_plane: ControlPlane, namespace: str) -> None:
    """What changes during an outage is no such sign; what changes without one is."""
    missed = asyncio.Event()
    ensembles = Ensembles(cluster, Store(), lambda _: None, namespace, on_missed=missed.set)
    await ensembles.list()
    comparing = asyncio.create_task(ensembles.run())
    try:
        make_ensemble(control_plane, namespace, "e", "a")
        ensembles.doubt()
        await ensembles.certain()
        assert not missed.is_set()
        make_ensemble(control_plane, namespace, "e", "a", "b")
        # As the minute's end does, without doubt.
        ensembles._woken.set()
        await missed.wait()
    finally:
        comparing.cancel()
        await asyncio.gather(comparing, return_exceptions=True)


async def test_kinds_are_what_the_server_serves(control_plane: ControlPlane) -> None:
    """Plural, version and scope are written down, not asked for."""
    for kind in (*WATCHED, ENSEMBLE, SECRET, EVENT, SERVICE_ACCOUNT):
        path = kind.path().rsplit("/", 1)[0]
        served = {r["name"]: r for r in control_plane.ask("GET", path)["resources"]}
        assert (served[kind.plural]["kind"], served[kind.plural]["namespaced"]) == (kind.name, kind.namespaced)
