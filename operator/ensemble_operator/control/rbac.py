"""The rules that the operator's role must have: these and no more. One source for the chart and for tests. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_operator.control.kinds import (
    CLAIM_TEMPLATE,
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    ENSEMBLE,
    EVENT,
    LEASE,
    NETWORK_POLICY,
    NODE,
    POD,
    RESOURCE_CLAIM,
    RESOURCE_SLICE,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    Kind,
)

Rule = dict[str, list[str]]

# Followed by a watch, made and kept by server-side apply (patch, and create where the object is new), removed when
# they are no longer wanted.
_APPLIED = ("list", "watch", "create", "patch", "delete")
_CHILDREN = (
    STATEFUL_SET,
    DEPLOYMENT,
    SERVICE,
    CONFIG_MAP,
    SERVICE_ACCOUNT,
    NETWORK_POLICY,
    DISRUPTION_BUDGET,
    CLAIM_TEMPLATE,
)
_OTHERS: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (
    (ENSEMBLE, "", ("get", "list", "watch")),
    (ENSEMBLE, "status", ("patch",)),
    # A worker pod is deleted to be replaced by one of the new template, or because its node is gone.
    (POD, "", ("list", "watch", "delete")),
    # By name only, created once: never listed, never watched.
    (SECRET, "", ("get", "create", "delete")),
    (EVENT, "", ("create", "patch")),
)
# Where it runs, not where the ensembles are.
_OWN: tuple[tuple[Kind, tuple[str, ...]], ...] = ((LEASE, ("get", "create", "update")),)
# Only with rights in the whole cluster: to say which devices are free.
_CLUSTER: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (NODE, ("list",)),
    (RESOURCE_SLICE, ("list",)),
    (RESOURCE_CLAIM, ("list",)),
)


def rules(*, cluster_wide: bool = True) -> list[Rule]:
    """The rules of the role in the namespaces that are served: all (a ClusterRole), or one (a Role)."""
    found = [_rule(kind, "", _APPLIED) for kind in _CHILDREN]
    found += [_rule(kind, subresource, verbs) for kind, subresource, verbs in _OTHERS]
    if cluster_wide:
        found += [_rule(kind, "", verbs) for kind, verbs in _CLUSTER]
    return found


def own_rules() -> list[Rule]:
    """The rules of the role in the operator's own namespace."""
    return [_rule(kind, "", verbs) for kind, verbs in _OWN]


def _rule(kind: Kind, subresource: str, verbs: Sequence[str]) -> Rule:
    named = f"{kind.plural}/{subresource}" if subresource else kind.plural
    return {"apiGroups": [kind.group], "resources": [named], "verbs": list(verbs)}
