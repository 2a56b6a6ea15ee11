"""The gateway: a Deployment whose pods drain before they go."""

from __future__ import annotations

import math
from dataclasses import asdict

from ensemble_contract.pod import ADMIN_PORT, HTTP_PORT, KEYS_FOLDER, STATE_FOLDER
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.manifests.amounts import bytes_quantity
from ensemble_operator.manifests.inputs import ChildSettings
from ensemble_operator.manifests.keeping import recorded
from ensemble_operator.manifests.names import GATEWAY, UPGRADE, Manifest, child_name, labels, metadata, selector
from ensemble_operator.manifests.pods import (
    ADMIN,
    MIRROR,
    Container,
    Placement,
    admin_probe,
    plain,
    pod_template,
)
from ensemble_operator.manifests.worker import HOSTNAME

# What a gateway needs besides its row store.
OWN_MEMORY_BYTES = 256 << 20
# The time that a Service takes to stop sending here, and that answering the last request takes besides its deadline.
UNPUBLISH_S = 5
LAST_ANSWER_S = 5
# Ready once, then ready until it ends: a gateway without workers answers better itself than its Service would.
_PROBES = {
    "startupProbe": admin_probe("/v1/health", period_s=1, timeout_s=2, failures=120),
    "readinessProbe": admin_probe("/v1/ready", period_s=2, timeout_s=2, failures=3),
    "livenessProbe": admin_probe("/v1/health", period_s=10, timeout_s=5, failures=6),
}


def gateway_deployment(ensemble: InferenceEnsemble, uid: str, settings: ChildSettings) -> Manifest:
    """The gateways. A pod of a former template goes when its successor is Ready."""
    overrides = ensemble.spec.pod_template.gateway
    upgrade = ensemble.annotations.get(UPGRADE, "")
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, GATEWAY), GATEWAY),
        "spec": {
            "replicas": ensemble.spec.gateway.replicas,
            "revisionHistoryLimit": 2,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": selector(ensemble.name, GATEWAY)},
            "template": _template(ensemble, settings),
        },
    }
    asked = [asdict(overrides), ensemble.spec.gateway.timeout_s, ensemble.spec.batching.max_queue_bytes, upgrade]
    return recorded(deployment, plain(asked), plain([asdict(overrides), upgrade]))


def _template(ensemble: InferenceEnsemble, settings: ChildSettings) -> Manifest:
    overrides, listen_on = ensemble.spec.pod_template.gateway, settings.listen_on
    memory = bytes_quantity(ensemble.spec.batching.max_queue_bytes + OWN_MEMORY_BYTES)
    defaults = {"limits": {"memory": memory}, "requests": {"cpu": "100m", "memory": memory}}
    container = Container(
        name=GATEWAY,
        image=overrides.image or settings.gateway_image,
        command=(
            *("python", "-m", "ensemble_gateway"),
            *("--http", f"{listen_on}:{HTTP_PORT}"),
            *("--admin", f"tcp://{listen_on}:{ADMIN_PORT}"),
            *("--mirror", MIRROR),
            *("--keys", KEYS_FOLDER),
            *("--state-dir", STATE_FOLDER),
        ),
        ports=(("http", HTTP_PORT), ADMIN),
        probes=_PROBES,
        resources=plain(overrides.resources) or defaults,
        lifecycle={"preStop": {"sleep": {"seconds": UNPUBLISH_S}}},
    )
    placement = Placement(
        node_selector={},
        tolerations=tuple(plain(overrides.tolerations)),
        volumes=(),
        mounts=(),
        grace_s=UNPUBLISH_S + math.ceil(ensemble.spec.gateway.timeout_s) + LAST_ANSWER_S,
        spread={
            "maxSkew": 1,
            "topologyKey": HOSTNAME,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(ensemble.name, GATEWAY)},
            "matchLabelKeys": ["pod-template-hash"],
        },
    )
    named = labels(ensemble.name, GATEWAY)
    return pod_template(ensemble, named, overrides, container, placement, settings)
