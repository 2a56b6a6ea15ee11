"""From an ensemble, its models and its allocation matrix to the plans of its workers and gateways. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_contract.plan import GatewayPlan, Instance, ModelSource, ServedMember, WorkerAddress, WorkerPlan
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.api import InferenceEnsemble, Member, member_digest


@dataclass(frozen=True, slots=True)
class Tensors:
    """One row's inputs and outputs, and the class names of the outputs that have some."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: Mapping[str, tuple[str, ...]]


def model_source(member: Member, resolved: Member) -> ModelSource:
    """What a worker loads for a member. `resolved` has the SHA-256 that its file has now, which makes the digest.

    Only a declared SHA-256 is demanded of the file: a worker does not read a file twice for what nobody asked.
    """
    return ModelSource(
        name=member.name,
        digest=member_digest(resolved),
        uri=member.model.uri,
        format=member.format,
        activation=member.activation,
        sha256=member.model.sha256,
        version=member.model.version,
    )


def worker_plans(
    ensemble: str,
    generation: int,
    matrix: Matrix,
    sources: Mapping[str, ModelSource],
    tensors: Tensors,
    row_cache_bytes: int,
) -> dict[str, WorkerPlan]:
    """A plan for every device of the matrix, by the device's name, with the members that are placed there only."""
    plans = {}
    for index, device in enumerate(matrix.devices):
        row = matrix.row(index)
        plans[device] = WorkerPlan(
            generation=generation,
            ensemble=ensemble,
            worker=device,
            inputs=tensors.inputs,
            outputs=tensors.outputs,
            members=tuple(sources[member] for member in row),
            instances=tuple(Instance(member, batch_size) for member, batch_size in row.items()),
            row_cache_bytes=row_cache_bytes,
        )
    return plans


def gateway_plan(
    ensemble: InferenceEnsemble,
    generation: int,
    sources: Mapping[str, ModelSource],
    tensors: Tensors,
    addresses: Mapping[str, str],
) -> GatewayPlan:
    """What the gateway serves, from the workers at `addresses`.

    A member that no worker holds stays in the plan: answers name it as missing.
    """
    spec = ensemble.spec
    return GatewayPlan(
        generation=generation,
        ensemble=ensemble.name,
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        members=tuple(_served(member, sources[member.name]) for member in spec.members),
        workers=tuple(WorkerAddress(name, address) for name, address in addresses.items()),
        rule=spec.combine.rule,
        quorum=spec.combine.quorum,
        labels=dict(tensors.labels),
        timeout_s=spec.gateway.timeout_s,
        max_delay_s=spec.batching.max_delay_s,
        max_queue_bytes=spec.batching.max_queue_bytes,
    )


def _served(member: Member, source: ModelSource) -> ServedMember:
    return ServedMember(
        name=member.name,
        digest=source.digest,
        version=source.version,
        weight=member.weight,
        format=source.format,
        activation=source.activation,
    )
