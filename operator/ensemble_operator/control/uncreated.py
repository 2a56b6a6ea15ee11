"""Pods that should be there and that nobody can create: for a quota, a policy, a webhook. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ensemble_operator.control.observe import Observed
from ensemble_operator.manifests import pool_name


def workers_not_created(name: str, pools: int, seen: Observed) -> str:
    """Which StatefulSet of an ensemble has fewer pods than it shall have, and who knows why; empty if none has."""
    counts = Counter(view.pod.pool for view in seen.workers)
    for pool in range(pools):
        wanted = int((seen.stateful_sets.get(pool_name(name, pool)) or {"spec": {}})["spec"].get("replicas", 0))
        if counts[pool] < wanted:
            there = f"{counts[pool]} of {wanted} pods exist"
            return f"{there}: kubectl describe statefulset {pool_name(name, pool)} says why"
    return ""


def gateways_not_created(seen: Observed) -> str:
    """Why the Deployment's pods cannot be created; empty if they can."""
    for name, deployment in seen.deployments.items():
        conditions: list[Mapping[str, Any]] = (deployment.get("status") or {}).get("conditions") or []
        for condition in conditions:
            if (condition["type"], condition["status"]) == ("ReplicaFailure", "True"):
                return f"pods of Deployment {name} cannot be created: {condition.get('message', '')}"
    return ""
