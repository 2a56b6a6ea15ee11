"""From built fields to the typed resource, where a value depends on another: formats, quorum, device counts. Pure."""

from __future__ import annotations

import dataclasses

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.api.ensemble import (
    Autoscaling,
    Batching,
    Combine,
    Devices,
    Gateway,
    Measurement,
    Member,
    ModelRef,
    Output,
    Planning,
    PodTemplate,
    Spec,
    Transport,
)
from ensemble_operator.api.rules import format_of


def make_model(uri: str, sha256: str, version: str, credentials_secret: str) -> ModelRef:
    """Where a model file is; digests are compared in lower case."""
    return ModelRef(uri, sha256.lower(), version, credentials_secret)


def make_measurement(device_class: str, batch_size: int, memory_bytes: int, latency_s: float) -> Measurement:
    """One entry of a profile; `*` stands for any device class."""
    return Measurement("" if device_class == "*" else device_class, batch_size, memory_bytes, latency_s)


def make_profile(measurements: tuple[Measurement, ...]) -> tuple[Measurement, ...]:
    """A member's profile."""
    return measurements


def make_combine(rule: str, quorum: int | None) -> tuple[str, int | None]:
    """Rule and quorum, before the number of members is known."""
    return rule, quorum


def make_member(
    name: str,
    model: ModelRef,
    format: str | None,  # noqa: A002  the field's own name
    activation: str,
    weight: float,
    profile: tuple[Measurement, ...] | None,
) -> Member:
    """A member, with the format that its URI's suffix tells where it names none."""
    return Member(name, model, format or format_of(model.uri) or "", activation, weight, profile or ())


def make_spec(
    *,
    members: tuple[Member, ...],
    inputs: tuple[TensorSpec, ...] | None,
    outputs: tuple[Output, ...] | None,
    combine: tuple[str, int | None],
    devices: Devices,
    extra_devices: tuple[Devices, ...],
    autoscaling: Autoscaling | None,
    batching: Batching,
    planning: Planning,
    gateway: Gateway,
    transport: Transport,
    rollout: str,
    pod_template: PodTemplate,
) -> Spec:
    """The spec: quorum default all members; with autoscaling, the count of devices is its minimum."""
    rule, quorum = combine
    return Spec(
        members=members,
        inputs=inputs or (),
        outputs=tuple(output.tensor for output in outputs or ()),
        labels={output.tensor.name: output.labels for output in outputs or () if output.labels is not None},
        combine=Combine(rule, quorum or len(members)),
        devices=dataclasses.replace(devices, count=autoscaling.min_devices) if autoscaling else devices,
        extra_devices=extra_devices,
        autoscaling=autoscaling,
        batching=batching,
        planning=planning,
        gateway=gateway,
        transport=transport,
        rollout=rollout,
        pod_template=pod_template,
    )
