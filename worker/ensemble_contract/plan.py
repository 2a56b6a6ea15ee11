"""The plan: what each worker runs and what each gateway serves. JSON with camelCase names, pushed over admin APIs.

A plan has a generation and the highest wins. Members are listed once; a worker's row is sparse.
"""

from __future__ import annotations

import math
import re
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from ensemble_contract.errors import InvalidPlan, PlanTooLarge
from ensemble_contract.tensors import FLOATING, TensorSpec
from ensemble_contract.wire import MAX_BATCH_ROWS

MAX_PLAN_BYTES = 900_000
MAX_MEMBERS = 64
MAX_GENERATION = (1 << 63) - 1
MAX_BATCH_SIZE = MAX_BATCH_ROWS

RULES = ("mean", "weightedMean", "geometricMean", "median", "max", "min", "vote", "weightedVote", "none")
WEIGHTED_RULES = frozenset({"weightedMean", "weightedVote"})
INTEGER_RULES = frozenset({"max", "min", "none"})
FORMATS = ("torch-export", "torchscript", "onnx")
ACTIVATIONS = ("none", "softmax", "sigmoid")


class ModelSource(msgspec.Struct, frozen=True, rename="camel"):
    """Where a member's model file is and what it must be.

    `digest` identifies what answers: it changes whenever the file, its format or its activation does.
    """

    name: str
    digest: str
    uri: str
    format: str
    activation: str = "none"
    sha256: str = ""
    version: str = "1"

    def __post_init__(self) -> None:
        """Check format, activation and hash."""
        _check_model("members", self.name, self.format, self.activation)
        if self.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise InvalidPlan(f"members: sha256 {self.sha256[:80]!r} of {self.name!r} is not 64 hexadecimal digits")


class Instance(msgspec.Struct, frozen=True, rename="camel"):
    """A cell of the allocation matrix: a member on this worker's device, with its batch size in rows.

    While one version of a member replaces another, both are listed, and `digest` says which this is; empty: the only.
    """

    member: str
    batch_size: int
    digest: str = ""


class WorkerPlan(msgspec.Struct, frozen=True, rename="camel"):
    """A row of the allocation matrix, as its worker needs it.

    `row_cache_bytes` bounds the rows that gateways may leave in the worker (across pods; unused in shared memory).
    """

    generation: int
    ensemble: str
    worker: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    members: tuple[ModelSource, ...]
    instances: tuple[Instance, ...]
    row_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        """Check that the instances name listed members, each pair of version and batch size once."""
        _check_generation(self.generation)
        _check_tensors(self.inputs, self.outputs)
        if self.row_cache_bytes < 0:
            raise InvalidPlan(f"rowCacheBytes: {self.row_cache_bytes} is below 0")
        versions = [(m.name, m.digest) for m in self.members]
        if len(set(versions)) != len(versions):
            raise InvalidPlan("members: a version of a member is listed twice")
        placed = [(source_of(self.members, i), i.batch_size) for i in self.instances]
        if len(set(placed)) != len(placed):
            raise InvalidPlan("instances: a member is placed twice on one device with the same batch size")
        for instance in self.instances:
            _check_batch_size("instances", instance.member, instance.batch_size)


def source_of(members: tuple[ModelSource, ...], instance: Instance) -> ModelSource:
    """The version of a member that an instance runs.

    Raises InvalidPlan if it is not listed, or of several it is not said which.
    """
    versions = [m for m in members if m.name == instance.member and instance.digest in ("", m.digest)]
    if not versions:
        version = f" {instance.digest}" if instance.digest else ""
        raise InvalidPlan(f"instances: member {instance.member!r}{version} is not listed in members")
    if len(versions) > 1:
        raise InvalidPlan(f"instances: {len(versions)} versions of {instance.member!r} are listed: a digest is needed")
    return versions[0]


class ServedMember(msgspec.Struct, frozen=True, rename="camel"):
    """A member as the gateway sees it: which digest answers for it now, and how much its answer weighs."""

    name: str
    digest: str
    version: str = "1"
    weight: float = 1.0
    format: str = "torch-export"
    activation: str = "none"

    def __post_init__(self) -> None:
        """Check format, activation and weight."""
        _check_model("members", self.name, self.format, self.activation)
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InvalidPlan(f"members: weight {self.weight} of {self.name!r} is not above 0")


class WorkerAddress(msgspec.Struct, frozen=True, rename="camel"):
    """A worker's name and data address: `unix:PATH` (shared memory) or `tcp://HOST:PORT` (ZeroMQ)."""

    name: str
    address: str

    def __post_init__(self) -> None:
        """Check the address's form; whether somebody is there is found out by connecting."""
        if not _is_address(self.address):
            raise InvalidPlan(
                f"workers: address {self.address[:200]!r} of {self.name!r} is neither unix:PATH nor tcp://HOST:PORT"
            )


class GatewayPlan(msgspec.Struct, frozen=True, rename="camel"):
    """What a gateway serves, with which rule, from which workers. Instances are what workers report live.

    With `hold`, requests are admitted to this plan at once and wait, within their deadlines, until its members live;
    without, the former plan serves until every member of this one has a live instance.
    """

    generation: int
    ensemble: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    members: tuple[ServedMember, ...]
    workers: tuple[WorkerAddress, ...]
    rule: str = "mean"
    quorum: int = 0
    labels: dict[str, tuple[str, ...]] = {}
    timeout_s: float = 30.0
    max_delay_s: float = 0.0
    max_queue_bytes: int = 512 << 20
    version: str = "1"
    hold: bool = False

    def __post_init__(self) -> None:
        """Check rule, quorum, limits and names. A quorum of 0 means all members."""
        _check_generation(self.generation)
        _check_tensors(self.inputs, self.outputs)
        _check_limits(self)
        names = [m.name for m in self.members]
        if not names or len(set(names)) != len(names):
            raise InvalidPlan("members: at least one, each with a name of its own")
        if len(names) > MAX_MEMBERS:
            raise InvalidPlan(f"members: {len(names)} are over the limit of {MAX_MEMBERS}")
        if len({worker.name for worker in self.workers}) != len(self.workers):
            raise InvalidPlan("workers: a name is listed twice")
        if self.rule not in RULES:
            raise InvalidPlan(f"rule: {self.rule!r} is not one of {', '.join(RULES)}")
        if self.rule not in INTEGER_RULES and any(o.datatype not in FLOATING for o in self.outputs):
            raise InvalidPlan(f"rule: {self.rule!r} needs floating outputs")
        if not 0 <= self.quorum <= len(names):
            raise InvalidPlan(f"quorum: {self.quorum} is not in 1..{len(names)}")


class EnsemblePlan(msgspec.Struct, frozen=True, rename="camel"):
    """The whole plan of an ensemble in one document: the mirror from which every pod can start by itself.

    `sources` has each version of each member once; `rows` has, by worker, its instances as (index in `sources`, batch
    size). A worker without a row runs nothing.
    """

    gateway: GatewayPlan
    sources: tuple[ModelSource, ...]
    rows: dict[str, tuple[tuple[int, int], ...]]
    row_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        """Check that every row names listed versions, each with a batch size once."""
        if self.row_cache_bytes < 0:
            raise InvalidPlan(f"rowCacheBytes: {self.row_cache_bytes} is below 0")
        versions = {(source.name, source.digest) for source in self.sources}
        if len(versions) != len(self.sources):
            raise InvalidPlan("sources: a version of a member is listed twice")
        for worker, row in self.rows.items():
            if len(set(row)) != len(row):
                raise InvalidPlan(f"rows: {worker!r} has a member twice with the same batch size")
            for index, batch_size in row:
                if not 0 <= index < len(self.sources):
                    raise InvalidPlan(f"rows: {worker!r} names member {index} of {len(self.sources)}")
                _check_batch_size("rows", self.sources[index].name, batch_size)

    @property
    def generation(self) -> int:
        """The plan's generation; the highest wins."""
        return self.gateway.generation

    def worker(self, name: str) -> WorkerPlan | None:
        """A worker's row of it; None if the plan does not know the worker."""
        return self.row(name) if name in self.rows else None

    def row(self, name: str) -> WorkerPlan:
        """A worker's row of it, without instances if the plan does not know the worker."""
        row = self.rows.get(name, ())
        sources = [self.sources[index] for index, _ in row]
        return WorkerPlan(
            generation=self.generation,
            ensemble=self.gateway.ensemble,
            worker=name,
            inputs=self.gateway.inputs,
            outputs=self.gateway.outputs,
            members=tuple(dict.fromkeys(sources)),
            instances=tuple(
                Instance(source.name, size, source.digest) for source, (_, size) in zip(sources, row, strict=True)
            ),
            row_cache_bytes=self.row_cache_bytes,
        )


def _check_generation(generation: int) -> None:
    if not 0 <= generation <= MAX_GENERATION:
        raise InvalidPlan(f"generation: {generation} is not in 0..{MAX_GENERATION}")


def _check_batch_size(field: str, member: str, batch_size: int) -> None:
    if not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise InvalidPlan(f"{field}: batch size {batch_size} of {member!r} is not in 1..{MAX_BATCH_SIZE}")


def _check_limits(plan: GatewayPlan) -> None:
    if not (math.isfinite(plan.timeout_s) and plan.timeout_s > 0):
        raise InvalidPlan(f"timeoutS: {plan.timeout_s} is not above 0")
    if not (math.isfinite(plan.max_delay_s) and plan.max_delay_s >= 0):
        raise InvalidPlan(f"maxDelayS: {plan.max_delay_s} is below 0")
    if plan.max_queue_bytes < 1:
        raise InvalidPlan(f"maxQueueBytes: {plan.max_queue_bytes} is not above 0")


def _check_model(field: str, name: str, form: str, activation: str) -> None:
    if form not in FORMATS:
        raise InvalidPlan(f"{field}: format {form[:80]!r} of {name!r} is not one of {', '.join(FORMATS)}")
    if activation not in ACTIVATIONS:
        raise InvalidPlan(f"{field}: activation {activation[:80]!r} of {name!r} is not one of {', '.join(ACTIVATIONS)}")


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        named = bool(parts.hostname and parts.port)
    except ValueError:
        return False
    if parts.scheme == "unix":
        return len(address) > len("unix:")
    return parts.scheme == "tcp" and named and parts.path == parts.query == parts.fragment == ""


def _check_tensors(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    for field, tensors in (("inputs", inputs), ("outputs", outputs)):
        names = [t.name for t in tensors]
        if not names or len(set(names)) != len(names):
            raise InvalidPlan(f"{field}: at least one, each with a name of its own")


PlanT = TypeVar("PlanT", WorkerPlan, GatewayPlan, EnsemblePlan)


def encode_plan(plan: WorkerPlan | GatewayPlan | EnsemblePlan) -> bytes:
    """The JSON of a plan.

    Raises PlanTooLarge if it is over 900 kB, which a ConfigMap could not hold.
    """
    text = msgspec.json.encode(plan)
    if len(text) > MAX_PLAN_BYTES:
        raise PlanTooLarge(f"the plan has {len(text)} bytes, over the limit of {MAX_PLAN_BYTES}")
    return text


def decode_plan(text: bytes, form: type[PlanT]) -> PlanT:
    """A plan from its JSON.

    Raises InvalidPlan with the path of what is wrong.
    """
    if len(text) > MAX_PLAN_BYTES:
        raise InvalidPlan(f"the plan has {len(text)} bytes, over the limit of {MAX_PLAN_BYTES}")
    try:
        return msgspec.json.decode(text, type=form)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidPlan(str(error)) from error
