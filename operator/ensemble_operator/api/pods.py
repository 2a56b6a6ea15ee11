"""Declarations of what describes pods: pools of devices, tolerations, and the parts of pods that a user may change."""

from __future__ import annotations

from ensemble_operator.api.ensemble import Devices, KubernetesObject, PodOverrides, PodTemplate
from ensemble_operator.api.schema import INVALID, Choice, Duration, Integer, Kind, Percentage, Place, Quantity, Text
from ensemble_operator.api.structure import ABSENT, REQUIRED, Checked, Field, Group, Kubernetes, Listing, Rule, Texts
from ensemble_operator.quantities import parse_bytes, parse_cores

CLUSTER = "cluster"
"""The scope of fields that only describe a cluster."""

GPU = "nvidia.com/gpu"
CPU = "cpu"
MAX_DEVICES = 4096

SUBDOMAIN = Text(253, 0, r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?", "a DNS-1123 name (lower-case letters, digits, - and .)")
_QUALIFIED = Text(
    317, 1, r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", "a label's name like example.com/zone"
)
_LABEL_VALUE = Text(
    63, 0, r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", "a label's value (letters, digits, -, _ and .)"
)
LABELS = Texts(_QUALIFIED, _LABEL_VALUE)
ANNOTATIONS = Texts(_QUALIFIED, Text(262_144, free=True))
_RESOURCE = Text(
    253, 1, r"cpu|[a-z0-9.-]+/[A-Za-z0-9][-A-Za-z0-9_.]*", "cpu, or a device plugin's resource like nvidia.com/gpu"
)


def _toleration(**parts: object) -> KubernetesObject:
    return {key: value for key, value in parts.items() if value is not None}


_TOLERATION = Group(
    fields=(
        Field("key", Text(317), "The taint's key; empty with operator Exists: every taint.", ABSENT, "key"),
        Field("operator", Choice(("Exists", "Equal")), "Exists, or Equal to the value.", ABSENT, "operator"),
        Field("value", Text(63), "The taint's value.", ABSENT, "value"),
        Field(
            "effect",
            Choice(("NoSchedule", "PreferNoSchedule", "NoExecute")),
            "Of the taint; all if absent.",
            ABSENT,
            "effect",
        ),
        Field("tolerationSeconds", Integer(0, 10**9), "How long NoExecute is tolerated.", ABSENT, "tolerationSeconds"),
    ),
    into=_toleration,
)
_TOLERATIONS = Listing(_TOLERATION, max_items=32)


def _check_cpu(pool: Checked, at: Place) -> None:
    for key in ("cores", "memory"):
        if pool["resource"] == CPU and pool.get(key, INVALID) is None:
            at.key(key).report("is required with resource cpu: it says how large a device is")
        if pool["resource"] != CPU and pool.get(key) is not None:
            at.key(key).report("is only for resource cpu; of a GPU worker's pod, podTemplate.worker.resources says it")


def _check_class(pool: Checked, at: Place) -> None:
    if pool["deviceClass"] and pool["resource"] != GPU:
        at.key("resource").report("cannot be combined with deviceClass: remove one")


def _devices(count: int | None, **rest: object) -> Devices:
    return Devices(count=count or 1, **rest)  # type: ignore[arg-type]  # each field's kind builds what it names


def _pool(count_default: object, counted: str, scope: str) -> Group:
    cores = Quantity(parse_cores, "1m", "1k")
    memory = Quantity(parse_bytes, "16Mi", "64Ti")
    acquire = "How long the ensemble waits for devices before it gives them back and tries again later."
    fields = (
        Field("count", Integer(1, MAX_DEVICES), counted, count_default, scope=scope),
        Field(
            "resource",
            _RESOURCE,
            "What a device is: a GPU resource, or cpu (then with cores and memory).",
            GPU,
            scope=scope,
        ),
        Field(
            "deviceClass", SUBDOMAIN, "A DeviceClass to claim a device of (DRA), instead of resource.", "", scope=scope
        ),
        Field(
            "cores",
            cores,
            "CPU request of one CPU device, without a limit; threads are cores rounded up.",
            ABSENT,
            scope=scope,
        ),
        Field(
            "memory", memory, "Memory of one CPU device: request, limit and capacity.", ABSENT, "memory_bytes", scope
        ),
        Field("nodeSelector", LABELS, "Labels that the nodes must have.", {}, scope=scope),
        Field("tolerations", _TOLERATIONS, "Taints of nodes that the workers tolerate.", [], scope=scope),
        Field("memoryHeadroom", Percentage(100), "Share of a device's memory that planning leaves free.", "10%"),
        Field("acquireTimeout", Duration("1s", "168h"), acquire, "10m", "acquire_timeout_s", scope),
    )
    rules = (
        Rule(
            "has(self.cores) == (self.resource == 'cpu') && has(self.memory) == (self.resource == 'cpu')",
            "cores and memory are needed with resource cpu, and only with it",
            ("resource",),
            _check_cpu,
        ),
        Rule(
            "!has(self.deviceClass) || self.deviceClass == '' || self.resource == 'nvidia.com/gpu'",
            "deviceClass replaces resource: remove one",
            ("resource", "deviceClass"),
            _check_class,
        ),
    )
    return Group(fields, _devices, rules)


DEVICES = _pool(ABSENT, "Devices to hold, one worker each; without autoscaling. Target of kubectl scale.", CLUSTER)
EXTRA_DEVICES = Listing(_pool(REQUIRED, "Devices of this pool, one worker each.", ""), max_items=16)


def _named(*required: str) -> Kind:
    return Listing(Kubernetes(required), max_items=64)


_OVERRIDES = Group(
    fields=(
        Field("image", Text(512, 0, r"[!-~]*", "an image reference"), "Image instead of the operator's own.", ""),
        Field("env", _named("name"), "Environment variables to add.", []),
        Field("volumes", _named("name"), "Volumes to add.", []),
        Field("volumeMounts", _named("name", "mountPath"), "Mounts to add to the container.", []),
        Field(
            "resources", Kubernetes(), "Requests and limits, instead of the defaults; a worker's device is added.", {}
        ),
        Field("nodeSelector", LABELS, "Labels that the nodes must have; a worker's is devices.nodeSelector first.", {}),
        Field("tolerations", _TOLERATIONS, "Taints of nodes to tolerate besides.", []),
        Field("affinity", Kubernetes(), "Affinity, as in a pod.", {}),
        Field("labels", LABELS, "Labels to add to the pods.", {}),
        Field("annotations", ANNOTATIONS, "Annotations to add to the pods.", {}),
        Field("imagePullSecrets", _named("name"), "Secrets to pull the image with.", []),
        Field("priorityClassName", SUBDOMAIN, "PriorityClass of the pods.", ""),
        Field("runtimeClassName", SUBDOMAIN, "RuntimeClass of the pods, such as nvidia.", ""),
    ),
    into=PodOverrides,
)
POD_TEMPLATE = Group(
    fields=(
        Field("worker", _OVERRIDES, "The workers' pods. Default resources of a GPU worker: 1 CPU and 4Gi.", {}),
        Field("gateway", _OVERRIDES, "The gateway's pods. Default resources: 100m CPU, maxQueueBytes + 256Mi.", {}),
    ),
    into=PodTemplate,
)
