"""From an ensemble, its models and its allocation matrix to the plan of its workers and gateways. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_contract.plan import EnsemblePlan, GatewayPlan, ModelSource, ServedMember, WorkerAddress
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


def ensemble_plan(
    gateway: GatewayPlan, matrix: Matrix, sources: Mapping[str, ModelSource], row_cache_bytes: int
) -> EnsemblePlan:
    """The whole plan: what the gateway serves, and the matrix as a row for every worker that the gateway knows.

    A device of the matrix is named as its worker.
    """
    indices = {member: index for index, member in enumerate(sources)}
    placed = {
        device: tuple((indices[member], size) for member, size in matrix.row(at).items())
        for at, device in enumerate(matrix.devices)
    }
    rows = {worker.name: placed.get(worker.name, ()) for worker in gateway.workers}
    return EnsemblePlan(gateway, tuple(sources.values()), rows, row_cache_bytes)


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
