"""Ensembles that differ in what their children are, and their golden files; `python -m` this writes them anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ensemble_operator.api import parse
from ensemble_operator.manifests import Children, ChildSettings, Manifest, children

GOLDEN = Path(__file__).parent / "golden"
UID = "7f0f7b0e-0000-4000-8000-000000000000"
SETTINGS = ChildSettings("example.com/worker:1.0", "example.com/gateway:1.0", operator_namespace="ensemble-system")
# Of the cases whose operator has other settings than these.
OTHER_SETTINGS = {"overrides": dataclasses.replace(SETTINGS, image_pull_secrets=("mirror", "registry"))}

_PLAN = '{"gateway":{"generation":3}}'
_KEYS = {"own.public": "p" * 40, "own.secret": "s" * 40, "peer.public": "q" * 40, "admin.token": "0123456789abcdef"}
_MEMBER = {"name": "a", "model": {"uri": "https://models.example/a.pt2"}}
_CPU = {"resource": "cpu", "cores": "1500m", "memory": "1536Mi"}

_OVERRIDES: Mapping[str, Any] = {
    "worker": {
        "image": "example.com/own-worker:2",
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "HOME", "value": "/scratch"}],
        "volumes": [
            {"name": "state", "emptyDir": {"sizeLimit": "200Gi"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "keys", "emptyDir": {}},
        ],
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "scratch", "mountPath": "/etc/ensemble/keys"},
        ],
        "resources": {"requests": {"cpu": "4", "memory": "32Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": "8"}},
        "nodeSelector": {"zone": "a", "gpu": "no"},
        "tolerations": [{"key": "team", "operator": "Equal", "value": "vision", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "Exists"}]}]
                }
            }
        },
        "labels": {"team": "vision", "app.kubernetes.io/component": "mine"},
        "annotations": {"note": "hello", "ensemble-operator.io/template": "mine"},
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "system-node-critical",
        "runtimeClassName": "nvidia",
    },
    "gateway": {"resources": {"requests": {"cpu": "2"}}, "env": [{"name": "POD_NAME", "value": "mine"}]},
}

SPECS: Mapping[str, Mapping[str, Any]] = {
    "gpu": {
        "members": [_MEMBER],
        "devices": {"count": 4, "nodeSelector": {"gpu": "h100"}},
        "gateway": {"replicas": 3, "timeout": "1500ms", "serviceType": "LoadBalancer"},
        "batching": {"maxQueueBytes": "1Gi"},
    },
    "cpu-plain": {
        "members": [_MEMBER],
        "devices": {"count": 2, **_CPU},
        "transport": {"encryption": "none"},
    },
    "dra": {"members": [_MEMBER], "devices": {"count": 2, "deviceClass": "gpu.nvidia.com"}},
    "pools": {
        "members": [_MEMBER],
        "devices": {"count": 2, "resource": "amd.com/gpu"},
        "extraDevices": [
            {"count": 1, **_CPU, "tolerations": [{"key": "node.kubernetes.io/unreachable", "operator": "Exists"}]},
            {"count": 3, "deviceClass": "gpu.example.com"},
        ],
    },
    "overrides": {
        "members": [
            {"name": "a", "model": {"uri": "pvc://models/a.pt2"}},
            {"name": "b", "model": {"uri": "pvc://models/deep/b.pt2", "credentialsSecret": "unused"}},
            {"name": "c", "model": {"uri": "pvc://other.claim/c.onnx"}},
            {"name": "d", "model": {"uri": "s3://bucket/d.pt2", "credentialsSecret": "bucket"}},
        ],
        "devices": {"count": 1, "nodeSelector": {"gpu": "h100"}},
        "podTemplate": _OVERRIDES,
    },
}


def resource(case: str, namespace: str = "vision") -> dict[str, Any]:
    """The InferenceEnsemble of a case, as a document."""
    return {
        "apiVersion": "ensemble-operator.io/v1alpha1",
        "kind": "InferenceEnsemble",
        "metadata": {"name": case, "namespace": namespace},
        "spec": SPECS[case],
    }


def inputs(case: str, namespace: str = "vision", uid: str = UID, settings: ChildSettings | None = None) -> Children:
    """What the children of a case are made of."""
    ensemble = parse(resource(case, namespace))
    plain = ensemble.spec.transport.encryption == "none"
    held = {"admin.token": _KEYS["admin.token"]} if plain else _KEYS
    counts = (ensemble.spec.devices.count, *(pool.count for pool in ensemble.spec.extra_devices))
    return Children(
        ensemble=ensemble,
        uid=uid,
        settings=settings or OTHER_SETTINGS.get(case, SETTINGS),
        replicas=counts,
        worker_secret=held,
        gateway_secret=held,
        plan=_PLAN,
        plan_annotations={"ensemble-operator.io/problem": "abc"},
        profiles={"a.json": "{}"},
    )


def text_of(manifests: tuple[Manifest, ...]) -> str:
    """Manifests as a golden file has them."""
    return yaml.dump_all(manifests, Dumper=_Unaliased, sort_keys=False, width=10_000)


class _Unaliased(yaml.SafeDumper):
    """Writes equal objects out wherever they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    for name in SPECS:
        (GOLDEN / f"{name}.yaml").write_text(text_of(children(inputs(name))))
