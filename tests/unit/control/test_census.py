"""How often the cluster is listed, and what is told when that fails."""

from __future__ import annotations

import pytest

from ensemble_operator.control.census import MAX_AGE_S, Census
from ensemble_operator.control.errors import Forbidden, LeadershipLost, Unavailable
from ensemble_operator.control.kinds import NODE, POD, Kind, Manifest
from tests.unit.control.ensembles import ensemble
from tests.unit.control.fake_cluster import FakeCluster, world_of

TINY = ensemble("a", devices={"count": 1, "resource": "nvidia.com/gpu"})
NODE_1: Manifest = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "n1"},
    "status": {"allocatable": {"nvidia.com/gpu": "4"}, "conditions": [{"type": "Ready", "status": "True"}]},
}


class Clock:
    """A time that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def census() -> tuple[Census, FakeCluster, Clock]:
    world, cluster = world_of(NODE_1)
    clock = Clock()
    return Census(world, clock), cluster, clock


async def free(found: Census) -> int | None:
    supply = await found.supply(TINY, 0)
    return None if supply is None else supply.free_count


async def test_the_cluster_is_listed_at_most_every_30_seconds() -> None:
    found, cluster, clock = census()
    assert [await free(found) for _ in range(5)] == [4] * 5
    clock.now = MAX_AGE_S - 1
    await free(found)
    assert cluster.lists.count(NODE) == 1
    clock.now = MAX_AGE_S
    await free(found)
    assert cluster.lists.count(NODE) == 2


@pytest.mark.parametrize("kind", [NODE, POD])
async def test_a_list_that_fails_leaves_what_was_seen_and_is_not_asked_again_at_once(kind: Kind) -> None:
    found, cluster, clock = census()
    assert await free(found) == 4
    clock.now = MAX_AGE_S
    cluster.failing = {kind: Unavailable("overloaded")}
    assert await free(found) == 4
    cluster.failing = {}
    before = len(cluster.lists)
    assert await free(found) == 4
    assert len(cluster.lists) == before
    clock.now = 2 * MAX_AGE_S
    assert await free(found) == 4
    assert len(cluster.lists) > before


async def test_who_may_not_list_tells_nothing_and_who_leads_no_longer_stops() -> None:
    found, cluster, clock = census()
    cluster.failing = {NODE: Forbidden("list", "", "nodes", None, "no")}
    assert await free(found) is None
    clock.now = MAX_AGE_S
    cluster.failing = {NODE: LeadershipLost("another leads")}
    with pytest.raises(LeadershipLost):
        await free(found)
