"""Watches, the store that they fill, and the list of ensembles, against a real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.ensembles import Ensembles
from ensemble_operator.control.errors import Unavailable
from ensemble_operator.control.kinds import (
    CHILDREN_SELECTOR,
    CONFIG_MAP,
    ENSEMBLE,
    ENSEMBLE_LABEL,
    FIELD_MANAGER,
    MANAGED_BY,
    POD,
    WATCHED,
    Key,
    Manifest,
)
from ensemble_operator.control.store import Store
from ensemble_operator.control.watches import Watches
from tests.support.connected import config_map, connected
from tests.support.control_plane import ControlPlane
from tests.support.kube_client import is_ready
from tests.support.tiny_operator import make_ensemble

DEADLINE_S = 60.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def cluster(control_plane: ControlPlane) -> AsyncIterator[Cluster]:
    async with connected(control_plane) as found:
        yield found


class Follower:
    """Watches of one namespace, and whom they woke."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.store, self.woken = Store(), list[Key]()
        self.doubts = 0
        self.watches = Watches(cluster, self.store, self.woken.append, namespace=namespace, on_doubt=self._doubt)

    def _doubt(self) -> None:
        self.doubts += 1

    async def until(self, holds: Any) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not holds():
                await asyncio.sleep(0.02)


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
        await follower.until(lambda: known(follower, namespace) == wanted)
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
        await follower.until(lambda: is_ready(follower.store.child(POD, key, "p")))
        assert set(follower.woken) == {key}
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
        await follower.until(lambda: known(follower, namespace) == wanted)
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
        async with asyncio.timeout(DEADLINE_S):
            await missed.wait()
    finally:
        comparing.cancel()
        await asyncio.gather(comparing, return_exceptions=True)
