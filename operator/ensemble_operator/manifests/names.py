"""What the children of an ensemble are called, and the labels, selectors and owner reference that they carry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ensemble_operator.api import API_VERSION, KIND, InferenceEnsemble

Manifest = dict[str, Any]

WORKER = "worker"
GATEWAY = "gateway"
PLAN = "plan"
PROFILES = "profiles"

MANAGER = "ensemble-operator"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
PART_OF_LABEL = "app.kubernetes.io/part-of"
COMPONENT_LABEL = "app.kubernetes.io/component"
ENSEMBLE_LABEL = "ensemble-operator.io/ensemble"
POOL_LABEL = "ensemble-operator.io/pool"

# On a pod template and its pods: a hash of what the template says, so that a pod of an older one is recognised.
TEMPLATE = "ensemble-operator.io/template"
# On the resource: a new value lets the children take the images of the operator that runs now.
UPGRADE = "ensemble-operator.io/upgrade"

# A Service's name is a DNS label.
MAX_NAME = 63
HASH_DIGITS = 8


def child_name(ensemble: str, suffix: str) -> str:
    """The name of a child, `ENSEMBLE-SUFFIX`; one too long for a DNS label is cut and told apart by a hash."""
    name = f"{ensemble}-{suffix}"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME - HASH_DIGITS - 1].rstrip('-')}-{short_hash(name)}"


def pool_name(ensemble: str, pool: int) -> str:
    """The name of a pool's StatefulSet: pool 0 is `devices`, those from 1 are `extraDevices`."""
    return child_name(ensemble, pool_suffix(pool))


def pool_suffix(pool: int) -> str:
    """What tells a pool's objects apart within their ensemble."""
    return f"{WORKER}-x{pool}" if pool else WORKER


def labels(ensemble: str, component: str, pool: int | None = None) -> dict[str, str]:
    """What every child carries; a pool's objects and pods also say which pool."""
    found = {
        MANAGED_BY_LABEL: MANAGER,
        PART_OF_LABEL: ensemble,
        COMPONENT_LABEL: component,
        ENSEMBLE_LABEL: ensemble,
    }
    return found if pool is None else {**found, POOL_LABEL: str(pool)}


def selector(ensemble: str, component: str, pool: int | None = None) -> dict[str, str]:
    """The labels that pick the pods of a component, or of one pool. They never change: selectors are immutable."""
    found = {COMPONENT_LABEL: component, ENSEMBLE_LABEL: ensemble}
    return found if pool is None else {**found, POOL_LABEL: str(pool)}


def selector_text(ensemble: str) -> str:
    """The selector of the workers of pool 0 as text, for `status.selector` (what an autoscaler watches)."""
    return ",".join(f"{key}={value}" for key, value in selector(ensemble, WORKER, 0).items())


def metadata(
    ensemble: InferenceEnsemble,
    uid: str,
    name: str,
    component: str,
    pool: int | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """The metadata of a child. Its owner's deletion is not blocked, which would need a right on finalizers."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": ensemble.name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    found: Manifest = {
        "name": name,
        "namespace": ensemble.namespace,
        "labels": labels(ensemble.name, component, pool),
        "ownerReferences": [owner],
    }
    return {**found, "annotations": dict(annotations)} if annotations else found


def short_hash(text: str) -> str:
    """A few hex digits that tell texts apart within one ensemble."""
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
