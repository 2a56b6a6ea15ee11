"""The typed InferenceEnsemble: what `parse` returns and everything else in the control plane works with.

Values are checked and complete: defaults filled in, units as the names say. Optional parts that are not there are
empty, or None where emptiness is a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.api.schema import Given

KubernetesObject = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Where a model file is. `sha256` is in lower case; empty: not checked. `credentials_secret` names a Secret."""

    uri: str
    sha256: str
    version: str
    credentials_secret: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """What an instance costs on a device class (empty: any): the bytes that it adds, and the latency of a batch."""

    device_class: str
    batch_size: int
    memory_bytes: int
    latency_s: float


@dataclass(frozen=True, slots=True)
class Member:
    """One DNN of the ensemble. `profile` is what the user declares instead of measuring; empty: measure."""

    name: str
    model: ModelRef
    format: str
    activation: str
    weight: float
    profile: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """An output as the resource declares it: its tensor, and the names of its classes or the URI of a file."""

    tensor: TensorSpec
    labels: tuple[str, ...] | str | None


@dataclass(frozen=True, slots=True)
class Combine:
    """How the members' outputs become one answer, and how many must have answered by the deadline."""

    rule: str
    quorum: int


@dataclass(frozen=True, slots=True)
class Devices:
    """A pool of equal devices, one worker each.

    `device_class` (DRA) replaces `resource` when not empty. `cores` and `memory_bytes` are those of one CPU device,
    None for others. `memory_headroom` is the fraction of a device's memory that planning leaves free. With
    autoscaling, `count` is its minimum.
    """

    count: int
    resource: str
    device_class: str
    cores: float | None
    memory_bytes: int | None
    node_selector: Mapping[str, str]
    tolerations: tuple[KubernetesObject, ...]
    memory_headroom: float
    acquire_timeout_s: float


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """How many devices the load may move between, and the utilisation (0..1) to hold."""

    min_devices: int
    max_devices: int
    target_utilization: float


@dataclass(frozen=True, slots=True)
class Batching:
    """Batch sizes to choose from, ascending; how long rows may wait for company; the row store's bytes."""

    sizes: tuple[int, ...]
    max_delay_s: float
    max_queue_bytes: int


@dataclass(frozen=True, slots=True)
class Planning:
    """What the plan shall reach (`target_throughput` in rows/s; 0: no target) and how it is searched."""

    objective: str
    target_throughput: float
    strategy: str
    evaluate: str
    max_iterations: int
    max_neighbours: int
    seed: int
    profile_budget_s: float


@dataclass(frozen=True, slots=True)
class Gateway:
    """The gateway's pods and Service; `timeout_s` is the deadline of requests that bring none."""

    replicas: int
    timeout_s: float
    service_type: str


@dataclass(frozen=True, slots=True)
class Transport:
    """How gateways and workers of a cluster talk: `curve` or `none`."""

    encryption: str


@dataclass(frozen=True, slots=True)
class PodOverrides:
    """What the user changes in a pod; objects as Kubernetes writes them. Empty: as it is."""

    image: str
    env: tuple[KubernetesObject, ...]
    volumes: tuple[KubernetesObject, ...]
    volume_mounts: tuple[KubernetesObject, ...]
    resources: KubernetesObject
    node_selector: Mapping[str, str]
    tolerations: tuple[KubernetesObject, ...]
    affinity: KubernetesObject
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    image_pull_secrets: tuple[KubernetesObject, ...]
    priority_class_name: str
    runtime_class_name: str


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """Overrides of the worker's and the gateway's pods."""

    worker: PodOverrides
    gateway: PodOverrides


@dataclass(frozen=True, slots=True)
class Spec:
    """What is wanted. Empty `inputs` or `outputs`: the models tell. `labels`, by output name: names, or a URI."""

    members: tuple[Member, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: Mapping[str, tuple[str, ...] | str]
    combine: Combine
    devices: Devices
    extra_devices: tuple[Devices, ...]
    autoscaling: Autoscaling | None
    batching: Batching
    planning: Planning
    gateway: Gateway
    transport: Transport
    rollout: str
    pod_template: PodTemplate


@dataclass(frozen=True, slots=True)
class InferenceEnsemble:
    """The resource. `given`: the scoped fields that the document sets (see `cluster_only`)."""

    name: str
    namespace: str
    spec: Spec
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    given: tuple[Given, ...] = field(default=(), compare=False)

    @property
    def pools(self) -> tuple[Devices, ...]:
        """All pools of devices: pool 0 is `devices`, those from 1 are `extraDevices`."""
        return (self.spec.devices, *self.spec.extra_devices)
