"""What becomes of errors: each that is the ensemble's business has a condition, and those that nobody foresaw, too."""

from __future__ import annotations

from typing import Any

import pytest

from ensemble_operator.control.conditions import NotServed
from ensemble_operator.control.errors import (
    Conflict,
    Forbidden,
    LeadershipLost,
    NamespaceTerminating,
    NotFound,
    Unavailable,
)
from ensemble_operator.control.kinds import ENSEMBLE, SECRET, Key
from ensemble_operator.control.reconcile import Reconciler
from tests.unit.control.fake_cluster import FakeCluster, condition, world_of

KEY = Key("default", "tiny")
DOCUMENT: dict[str, Any] = {
    "apiVersion": ENSEMBLE.api_version,
    "kind": ENSEMBLE.name,
    "metadata": {"name": "tiny", "namespace": "default", "uid": "u", "generation": 2, "resourceVersion": "1"},
    "spec": {
        "members": [{"name": "a", "model": {"uri": "file:///models/a.pt2"}}],
        "devices": {"count": 3, "resource": "cpu", "cores": "1", "memory": "1Gi"},
    },
    "status": {"replicas": 2, "url": "http://tiny", "devices": {"held": 2}},
}


async def reconciled(error: Exception) -> tuple[FakeCluster, Exception | None]:
    """What is told and raised when Secrets cannot be read for this error."""
    world, cluster = world_of()
    world.store.note(DOCUMENT)
    cluster.failing = {SECRET: error}
    reconciler = Reconciler(world)
    try:
        await reconciler.reconcile(KEY)
    except Exception as raised:
        return cluster, raised
    finally:
        await reconciler.close()
    return cluster, None


@pytest.mark.parametrize("error", [KeyError("b"), NotFound("the namespace is not there"), RuntimeError("a defect")])
async def test_what_nobody_has_foreseen_is_told_and_raised(error: Exception) -> None:
    cluster, raised = await reconciled(error)
    assert raised is error
    [status] = cluster.statuses
    found = condition(status, "Degraded")
    assert (found["status"], found["reason"]) == ("True", "InternalError")
    assert f"{type(error).__name__}: {error}" in found["message"]
    assert "The operator's log has more" in found["message"]
    assert [reason for reason, _ in cluster.events] == ["Degraded"]


@pytest.mark.parametrize(
    ("error", "type_", "reason"),
    [
        (NamespaceTerminating("it is being deleted"), "Degraded", "NamespaceTerminating"),
        (Forbidden("get", "", "secrets", "default", "no"), "Degraded", "Forbidden"),
        (NotServed("use devices.resource"), "Accepted", "NotServed"),
    ],
)
async def test_what_is_the_ensembles_business_is_told_and_tried_again(
    error: Exception, type_: str, reason: str
) -> None:
    cluster, raised = await reconciled(error)
    assert raised is None
    [status] = cluster.statuses
    assert (condition(status, type_)["reason"], condition(status, type_)["message"]) == (reason, str(error))


@pytest.mark.parametrize("error", [Unavailable("away"), Conflict("changed"), LeadershipLost("another leads")])
async def test_what_is_soon_over_is_only_raised(error: Exception) -> None:
    cluster, raised = await reconciled(error)
    assert raised is error
    assert cluster.statuses == []


async def test_what_was_not_looked_at_stays_as_it_was_told() -> None:
    cluster, _ = await reconciled(KeyError("b"))
    [status] = cluster.statuses
    assert (status["replicas"], status["url"], status["devices"]["held"]) == (2, "http://tiny", 2)


async def test_secrets_are_looked_at_again_in_time() -> None:
    world, _ = world_of()
    world.store.note(DOCUMENT)
    reconciler = Reconciler(world)
    outcome = await reconciler.reconcile(KEY)
    await reconciler.close()
    assert outcome.requeue_after_s is not None
    assert outcome.requeue_after_s <= 300
