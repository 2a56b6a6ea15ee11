"""Whose an object is that has a child's name, and when Secrets are read again."""

from __future__ import annotations

from typing import Any

import pytest

from ensemble_contract.keys import OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC
from ensemble_operator.control.conditions import NameTaken, NotServed
from ensemble_operator.control.errors import Conflict, NotFound
from ensemble_operator.control.keyring import contents_of
from ensemble_operator.control.kinds import (
    CLAIM_TEMPLATE,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    Key,
    Manifest,
)
from ensemble_operator.control.upkeep import LONGEST_AGE_S, SECRET_AGE_S, Upkeep
from ensemble_operator.manifests.contents import service_account
from tests.unit.control.ensembles import ensemble
from tests.unit.control.fake_cluster import world_of

KEY = Key("default", "tiny")
TINY = ensemble("a")
WANTED = service_account(TINY, "mine", "worker")


def owned(manifest: Manifest, uid: str, **owner: Any) -> Manifest:
    """An object with another controller, or without one."""
    reference = {**manifest["metadata"]["ownerReferences"][0], "uid": uid, **owner}
    references = [reference] if uid else []
    return {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": references, "uid": "live"}}


def unlabelled(manifest: Manifest) -> Manifest:
    """An object that the operator does not see."""
    return {**manifest, "metadata": {**manifest["metadata"], "labels": {}}}


THEIRS = {
    "no controller": unlabelled(owned(WANTED, "")),
    "another kind's": owned(WANTED, "x", kind="Rollout", apiVersion="example.com/v1"),
    "another ensemble's": unlabelled(owned(WANTED, "x", name="other")),
}


@pytest.mark.parametrize("whose", THEIRS)
async def test_an_object_of_somebody_else_is_neither_adopted_nor_deleted(whose: str) -> None:
    world, cluster = world_of(THEIRS[whose])
    world.store.note(THEIRS[whose])
    with pytest.raises(NameTaken, match="ServiceAccount 'tiny-worker' exists"):
        await Upkeep(world).apply(KEY, [WANTED], "mine")
    assert cluster.objects[SERVICE_ACCOUNT, "tiny-worker"] is THEIRS[whose]
    assert cluster.deleted == []


@pytest.mark.parametrize("found", [unlabelled(owned(WANTED, "mine")), owned(WANTED, "")])
async def test_what_is_ours_is_mended_without_its_labels_or_its_owner(found: Manifest) -> None:
    world, cluster = world_of(found)
    world.store.note(found)
    await Upkeep(world).apply(KEY, [WANTED], "mine")
    mended = cluster.objects[SERVICE_ACCOUNT, "tiny-worker"]["metadata"]
    assert mended["ownerReferences"] == WANTED["metadata"]["ownerReferences"]
    assert mended["labels"] == WANTED["metadata"]["labels"]
    assert cluster.deleted == []


@pytest.mark.parametrize("seen", [True, False])
async def test_a_child_of_a_former_ensemble_of_the_name_is_made_anew(seen: bool) -> None:
    former = owned(WANTED, "former")
    world, cluster = world_of(former)
    if seen:
        world.store.note(former)
    await Upkeep(world).apply(KEY, [WANTED], "mine")
    assert cluster.deleted == [("ServiceAccount", "tiny-worker")]
    assert cluster.objects[SERVICE_ACCOUNT, "tiny-worker"]["metadata"]["ownerReferences"][0]["uid"] == "mine"


async def test_a_child_of_a_former_ensemble_that_is_going_is_waited_for() -> None:
    former = owned(WANTED, "former")
    former["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(Conflict, match="is being deleted"):
        await Upkeep(world_of(former)[0]).apply(KEY, [WANTED], "mine")


async def test_only_what_the_ensemble_owns_is_surplus() -> None:
    metadata = {**WANTED["metadata"], "name": "tiny-worker-x1"}
    mine: Manifest = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata}
    theirs = owned({**mine, "metadata": {**metadata, "name": "copy"}}, "")
    world, cluster = world_of(mine, theirs)
    for found in (mine, theirs):
        world.store.note(found)
    await Upkeep(world).remove_surplus(KEY, [], (), "mine")
    assert cluster.deleted == [("StatefulSet", "tiny-worker-x1")]
    assert (STATEFUL_SET, "copy") in cluster.objects


async def test_a_kind_that_the_cluster_does_not_serve_is_named_with_what_to_use_instead() -> None:
    world, cluster = world_of()
    claim: Manifest = {
        "apiVersion": CLAIM_TEMPLATE.api_version,
        "kind": CLAIM_TEMPLATE.name,
        "metadata": {"name": "tiny-worker", "namespace": "default"},
    }
    cluster.failing = {CLAIM_TEMPLATE: NotFound("404"), SERVICE: NotFound("404")}
    with pytest.raises(NotServed, match=r"serves no .* of resource\.k8s\.io/v1.*: use devices\.resource"):
        await Upkeep(world).apply(KEY, [claim], "mine")
    service: Manifest = {"apiVersion": "v1", "kind": "Service", "metadata": claim["metadata"]}
    with pytest.raises(NotFound):
        await Upkeep(world).apply(KEY, [service], "mine")


async def test_secrets_are_read_again_within_their_age() -> None:
    now = 0.0
    world, cluster = world_of()
    upkeep = Upkeep(world, lambda: now)
    assert upkeep.look_again_s(KEY) == 0
    first = await upkeep.keyring(KEY, TINY, "mine")
    assert upkeep.look_again_s(KEY) == LONGEST_AGE_S
    cluster.objects.clear()
    now = SECRET_AGE_S - 1
    assert await upkeep.keyring(KEY, TINY, "mine") == first
    assert upkeep.look_again_s(KEY) == LONGEST_AGE_S - now
    now = LONGEST_AGE_S
    assert (await upkeep.keyring(KEY, TINY, "mine")).token != first.token


async def test_secrets_of_a_former_ensemble_of_the_name_are_made_anew() -> None:
    world, cluster = world_of()
    first = await Upkeep(world).keyring(KEY, TINY, "former")
    assert (await Upkeep(world).keyring(KEY, TINY, "mine")).token != first.token
    assert sorted(cluster.deleted) == [("Secret", "tiny-gateway"), ("Secret", "tiny-worker")]


@pytest.mark.parametrize(("there", "missing"), [("worker", "gateway"), ("gateway", "worker")])
async def test_a_secret_alone_keeps_its_keys_and_learns_those_of_the_other(there: str, missing: str) -> None:
    world, cluster = world_of()
    first = await Upkeep(world).keyring(KEY, TINY, "mine")
    del cluster.objects[SECRET, f"tiny-{missing}"]
    after = await Upkeep(world).keyring(KEY, TINY, "mine")
    assert cluster.deleted == [("Secret", f"tiny-{there}")]
    before, kept, made = getattr(first, there), getattr(after, there), getattr(after, missing)
    assert (kept[OWN_PUBLIC], kept[OWN_SECRET]) == (before[OWN_PUBLIC], before[OWN_SECRET])
    assert kept[PEER_PUBLIC] == made[OWN_PUBLIC] != before[PEER_PUBLIC]
    assert made[PEER_PUBLIC] == kept[OWN_PUBLIC]
    assert after.token == first.token
    held = {part: contents_of(cluster.objects[SECRET, f"tiny-{part}"]) for part in ("worker", "gateway")}
    assert held == {"worker": after.worker, "gateway": after.gateway}
