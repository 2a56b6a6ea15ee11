"""What a worker's and a gateway's pod have in common: restrictions, folders, probes, and the user's overrides.

The restrictions are those of the Pod Security Standard `restricted`. The user's part of a pod (`podTemplate`) is
merged into ours: lists by name or mount path, maps by key. Ours stay: the plan, the keys, labels, and POD_NAME.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_contract.pod import ADMIN_PORT, KEYS_FOLDER, PLAN_FILE, PLAN_FOLDER, STATE_FOLDER
from ensemble_operator.api import InferenceEnsemble, PodOverrides
from ensemble_operator.manifests.inputs import ChildSettings
from ensemble_operator.manifests.names import PLAN, TEMPLATE, Manifest, child_name

USER_ID = 65532
# Files of ConfigMaps are no secret; those of Secrets are read by the pod's group only.
PLAN_MODE = 0o444
KEYS_MODE = 0o440
MIRROR = f"{PLAN_FOLDER}/{PLAN_FILE}"
TEMPORARY_FOLDER = "/tmp"  # noqa: S108  an emptyDir of the pod
DIGEST_DIGITS = 16
# The port of every component's admin API, as its probes name it.
ADMIN = ("admin", ADMIN_PORT)

_POD_NAME = {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


@dataclass(frozen=True, slots=True)
class Container:
    """What a component's only container has of its own."""

    name: str
    image: str
    command: tuple[str, ...]
    ports: tuple[tuple[str, int], ...]
    probes: Mapping[str, Manifest]
    resources: Manifest
    lifecycle: Manifest
    env_from: tuple[Manifest, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the pods go, and what else they are of their own."""

    node_selector: Mapping[str, str]
    tolerations: tuple[Manifest, ...]
    volumes: tuple[Manifest, ...]
    mounts: tuple[Manifest, ...]
    grace_s: int
    resource_claims: tuple[Manifest, ...] = ()
    spread: Manifest | None = None


def pod_template(
    ensemble: InferenceEnsemble,
    labels: Mapping[str, str],
    overrides: PodOverrides,
    container: Container,
    placement: Placement,
    settings: ChildSettings,
) -> Manifest:
    """The template of a component's pods, annotated with a hash of all that it says."""
    pull_secrets = [{"name": name} for name in settings.image_pull_secrets]
    volumes = [*_our_volumes(ensemble, container.name), *placement.volumes]
    spec: Manifest = {
        "serviceAccountName": child_name(ensemble.name, container.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": placement.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(container, overrides, placement, settings.image_pull_policy)],
        "volumes": merged(volumes, overrides.volumes, "name", keep=("plan", "keys")),
        "nodeSelector": {**overrides.node_selector, **placement.node_selector},
        "tolerations": list(placement.tolerations),
        "affinity": overrides.affinity,
        "topologySpreadConstraints": [placement.spread] if placement.spread else [],
        "resourceClaims": list(placement.resource_claims),
        "imagePullSecrets": merged(pull_secrets, overrides.image_pull_secrets, "name"),
        "priorityClassName": overrides.priority_class_name,
        "runtimeClassName": overrides.runtime_class_name,
    }
    template: Manifest = plain(
        {
            "metadata": {
                "labels": {**overrides.labels, **labels},
                "annotations": {k: v for k, v in overrides.annotations.items() if k != TEMPLATE},
            },
            "spec": {key: value for key, value in spec.items() if value not in ({}, [], "", None)},
        }
    )
    template["metadata"]["annotations"][TEMPLATE] = digest(template)
    return template


def _container(container: Container, overrides: PodOverrides, placement: Placement, pull_policy: str) -> Manifest:
    env: list[Manifest] = [
        _POD_NAME,
        # Libraries keep caches at home, and ask who they are, which a uid without a passwd entry cannot tell.
        {"name": "HOME", "value": STATE_FOLDER},
        {"name": "USER", "value": "ensemble"},
    ]
    mounts: list[Manifest] = [
        {"name": "plan", "mountPath": PLAN_FOLDER, "readOnly": True},
        {"name": "keys", "mountPath": KEYS_FOLDER, "readOnly": True},
        {"name": "state", "mountPath": STATE_FOLDER},
        {"name": "tmp", "mountPath": TEMPORARY_FOLDER},
        *placement.mounts,
    ]
    found: Manifest = {
        "name": container.name,
        "image": container.image,
        "imagePullPolicy": pull_policy,
        "command": list(container.command),
        "env": merged(env, overrides.env, "name", keep=("POD_NAME",)),
        "envFrom": list(container.env_from),
        "ports": [{"name": n, "containerPort": port, "protocol": "TCP"} for n, port in container.ports],
        "volumeMounts": merged(mounts, overrides.volume_mounts, "mountPath", keep=(PLAN_FOLDER, KEYS_FOLDER)),
        **container.probes,
        "resources": container.resources,
        "lifecycle": container.lifecycle,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # What a process says last is then in the pod's status, where the operator and people find it.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    return {key: value for key, value in found.items() if value not in ({}, [], "")}


def _our_volumes(ensemble: InferenceEnsemble, component: str) -> list[Manifest]:
    plan = {"name": child_name(ensemble.name, PLAN), "optional": True, "defaultMode": PLAN_MODE}
    keys = {"secretName": child_name(ensemble.name, component), "defaultMode": KEYS_MODE}
    return [
        {"name": "plan", "configMap": plan},
        {"name": "keys", "secret": keys},
        {"name": "state", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]


def admin_probe(path: str, period_s: int, timeout_s: int, failures: int) -> Manifest:
    """A GET of the admin API."""
    return {
        "httpGet": {"path": path, "port": ADMIN[0], "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }


def merged(
    ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]], key: str, keep: tuple[str, ...] = ()
) -> list[Manifest]:
    """Ours, then theirs, told apart by `key`: the user's entry replaces ours in place, except for those in `keep`."""
    found = {str(entry[key]): dict(entry) for entry in ours}
    for entry in theirs:
        if entry[key] not in keep:
            found[str(entry[key])] = dict(entry)
    return list(found.values())


def plain(value: Any) -> Any:
    """A deep copy of JSON made of dicts and lists only, without the nulls."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def digest(content: object) -> str:
    """A hash of JSON, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]
