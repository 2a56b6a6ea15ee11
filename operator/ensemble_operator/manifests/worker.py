"""Workers: a StatefulSet for each pool of devices, one device a pod, and what claims such a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

from ensemble_contract.pod import ADMIN_PORT, CLAIMS_FOLDER, DATA_PORT, KEYS_FOLDER, STATE_FOLDER
from ensemble_operator.api import Devices, InferenceEnsemble
from ensemble_operator.manifests.amounts import bytes_quantity, cores_quantity
from ensemble_operator.manifests.inputs import ChildSettings, Claims
from ensemble_operator.manifests.keeping import recorded
from ensemble_operator.manifests.names import (
    UPGRADE,
    WORKER,
    Manifest,
    child_name,
    labels,
    metadata,
    pool_name,
    pool_suffix,
    selector,
    short_hash,
)
from ensemble_operator.manifests.pods import (
    ADMIN,
    MIRROR,
    Container,
    Placement,
    admin_probe,
    plain,
    pod_template,
)

CREDENTIALS_FOLDER = "/etc/ensemble/credentials"
CPU = "cpu"
HOSTNAME = "kubernetes.io/hostname"
# A worker that is told to end finishes the batches that run, and no more.
GRACE_S = 30
UNREACHABLE_S = 30
GPU_WORKER_REQUESTS = {"cpu": "1", "memory": "4Gi"}
_NODE_TROUBLES = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
# Importing torch from a cold disk and making a CUDA context take long; loading a model holds the interpreter for long.
# A pod that replaces another is Ready when it has loaded what that one had: a drain waits for it. Without a plan, and
# whatever plans come later, it is Ready when it answers.
_PROBES = {
    "startupProbe": admin_probe("/v1/health", period_s=1, timeout_s=2, failures=600),
    "readinessProbe": admin_probe("/v1/health?loaded", period_s=5, timeout_s=3, failures=3),
    "livenessProbe": admin_probe("/v1/health", period_s=10, timeout_s=5, failures=12),
}


def worker_stateful_set(
    ensemble: InferenceEnsemble, uid: str, settings: ChildSettings, pool: int, devices: Devices, replicas: int
) -> Manifest:
    """A pool's workers. Its pods come all at once, and are replaced only when somebody deletes them."""
    overrides = ensemble.spec.pod_template.worker
    placed = asdict(replace(devices, count=1, memory_headroom=0.0, acquire_timeout_s=0.0))
    upgrade = ensemble.annotations.get(UPGRADE, "")
    stateful_set = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": metadata(ensemble, uid, pool_name(ensemble.name, pool), WORKER, pool),
        "spec": {
            "replicas": replicas,
            "serviceName": child_name(ensemble.name, WORKER),
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": selector(ensemble.name, WORKER, pool)},
            "template": _template(ensemble, settings, pool, devices),
        },
    }
    asked = plain([asdict(overrides), placed, asdict(Claims.of(ensemble)), upgrade])
    return recorded(stateful_set, asked, plain([asdict(overrides), upgrade]))


def claim_template(ensemble: InferenceEnsemble, uid: str, pool: int, devices: Devices) -> Manifest:
    """What a pod of a pool claims one device with. Its spec is immutable, so its name tells the class."""
    request = {"name": "device", "exactly": {"deviceClassName": devices.device_class}}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": metadata(ensemble, uid, claim_template_name(ensemble.name, pool, devices), WORKER, pool),
        "spec": {"spec": {"devices": {"requests": [request]}}},
    }


def claim_template_name(ensemble: str, pool: int, devices: Devices) -> str:
    """The name of a pool's ResourceClaimTemplate."""
    return child_name(ensemble, f"{pool_suffix(pool)}-{short_hash(devices.device_class)}")


def worker_tolerations(ensemble: InferenceEnsemble, devices: Devices) -> tuple[Manifest, ...]:
    """Taints that a pool's workers tolerate: the user's, their own device's, and a node out of reach for a while."""
    theirs = [*devices.tolerations, *ensemble.spec.pod_template.worker.tolerations]
    ours: list[Manifest] = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": UNREACHABLE_S}
        for key in _NODE_TROUBLES
    ]
    if devices.resource != CPU and not devices.device_class:
        ours.append({"key": devices.resource, "operator": "Exists", "effect": "NoSchedule"})
    named = {toleration.get("key") for toleration in theirs}
    found = [*(plain(t) for t in theirs), *(t for t in ours if t["key"] not in named)]
    return tuple(t for index, t in enumerate(found) if t not in found[:index])


def _template(ensemble: InferenceEnsemble, settings: ChildSettings, pool: int, devices: Devices) -> Manifest:
    overrides, claims = ensemble.spec.pod_template.worker, Claims.of(ensemble)
    container = Container(
        name=WORKER,
        image=overrides.image or settings.worker_image,
        command=_command(settings.listen_on, devices),
        ports=(("data", DATA_PORT), ADMIN),
        probes=_PROBES,
        resources=_resources(overrides.resources, devices),
        lifecycle={},
        env_from=tuple({"secretRef": {"name": name}} for name in claims.secrets),
    )
    placement = Placement(
        node_selector=devices.node_selector,
        tolerations=worker_tolerations(ensemble, devices),
        volumes=_volumes(claims),
        mounts=_mounts(claims),
        grace_s=GRACE_S,
        resource_claims=_resource_claims(ensemble.name, pool, devices),
        spread={
            "maxSkew": 1,
            "topologyKey": HOSTNAME,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(ensemble.name, WORKER)},
        },
    )
    named = labels(ensemble.name, WORKER, pool)
    return pod_template(ensemble, named, overrides, container, placement, settings)


def _command(listen_on: str, devices: Devices) -> tuple[str, ...]:
    return (
        *("python", "-m", "ensemble_worker", "serve"),
        *("--name", "$(POD_NAME)"),
        *_device(devices),
        *("--admin", f"tcp://{listen_on}:{ADMIN_PORT}"),
        *("--data", f"tcp://{listen_on}:{DATA_PORT}"),
        *("--mirror", MIRROR),
        *("--keys", KEYS_FOLDER),
        *("--state-dir", STATE_FOLDER),
        *("--cache-dir", f"{STATE_FOLDER}/models"),
    )


def _device(devices: Devices) -> tuple[str, ...]:
    if devices.cores is None or devices.memory_bytes is None:
        return ("--device", "cuda-0")
    return ("--device", "cpu-0", "--threads", str(math.ceil(devices.cores)), "--memory", str(devices.memory_bytes))


def _resources(overrides: Mapping[str, object], devices: Devices) -> Manifest:
    """What the container requests; of a CPU device the pool says it all.

    A GPU worker has no memory limit of ours: a large model passes through the host's memory once.
    """
    found = plain(overrides)
    requests, limits = dict(found.get("requests") or {}), dict(found.get("limits") or {})
    if devices.cores is not None and devices.memory_bytes is not None:
        memory = bytes_quantity(devices.memory_bytes)
        requests.update({"cpu": cores_quantity(devices.cores), "memory": memory})
        limits = {**{k: v for k, v in limits.items() if k != "cpu"}, "memory": memory}
    else:
        requests = {**GPU_WORKER_REQUESTS, **requests} if not found else requests
        if not devices.device_class:
            limits[devices.resource] = "1"
            requests.pop(devices.resource, None)
    claims = [*(found.get("claims") or []), *([{"name": "device"}] if devices.device_class else [])]
    parts = {"claims": claims, "limits": limits, "requests": requests}
    return {key: value for key, value in parts.items() if value}


def _resource_claims(ensemble: str, pool: int, devices: Devices) -> tuple[Manifest, ...]:
    if not devices.device_class:
        return ()
    return ({"name": "device", "resourceClaimTemplateName": claim_template_name(ensemble, pool, devices)},)


def _volumes(claims: Claims) -> tuple[Manifest, ...]:
    volumes = [
        {"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": name, "readOnly": True}}
        for index, name in enumerate(claims.volumes)
    ]
    volumes += [
        {"name": f"credentials-{index}", "secret": {"secretName": name, "defaultMode": 0o440}}
        for index, name in enumerate(claims.secrets)
    ]
    return tuple(volumes)


def _mounts(claims: Claims) -> tuple[Manifest, ...]:
    folders = [
        *((f"claim-{index}", f"{CLAIMS_FOLDER}/{name}") for index, name in enumerate(claims.volumes)),
        *((f"credentials-{index}", f"{CREDENTIALS_FOLDER}/{name}") for index, name in enumerate(claims.secrets)),
    ]
    return tuple({"name": name, "mountPath": folder, "readOnly": True} for name, folder in folders)
