"""Pods that nobody can create are missed, and who knows why is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ensemble_operator.control.uncreated import gateways_not_created, workers_not_created
from tests.unit.control.ensembles import observed, pod, worker

SETS = {"tiny-worker": {"spec": {"replicas": 2}}, "tiny-worker-x1": {"spec": {"replicas": 1}}}


def test_who_has_fewer_pods_than_wanted_is_named() -> None:
    both = [worker("tiny-worker-0"), worker("tiny-worker-1", device=None, report=None)]
    extra = worker("tiny-worker-x1-0", pod=pod("tiny-worker-x1-0", pool=1))
    seen = replace(observed([*both, extra]), stateful_sets=SETS)
    assert workers_not_created("tiny", 2, seen) == ""
    wanted = "1 of 2 pods exist: kubectl describe statefulset tiny-worker says why"
    assert workers_not_created("tiny", 2, replace(seen, workers=(both[0], extra))) == wanted
    wanted = "0 of 1 pods exist: kubectl describe statefulset tiny-worker-x1 says why"
    assert workers_not_created("tiny", 2, replace(seen, workers=tuple(both))) == wanted
    assert workers_not_created("tiny", 1, replace(seen, workers=tuple(both))) == ""
    assert workers_not_created("tiny", 2, observed()) == "", "nothing was asked for yet"


def deployment(**condition: Any) -> dict[str, Any]:
    return {"tiny-gateway": {"status": {"conditions": [condition]}}}


def test_why_gateways_cannot_be_created_is_quoted() -> None:
    quota = deployment(type="ReplicaFailure", status="True", message="exceeded quota: pods")
    wanted = "pods of Deployment tiny-gateway cannot be created: exceeded quota: pods"
    assert gateways_not_created(replace(observed(), deployments=quota)) == wanted
    over = deployment(type="ReplicaFailure", status="False")
    assert gateways_not_created(replace(observed(), deployments=over)) == ""
    assert gateways_not_created(replace(observed(), deployments={"tiny-gateway": {}})) == ""
