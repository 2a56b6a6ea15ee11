"""What measuring tells about members, in its own words. Pure: lines in, measurements out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.api import Member as DeclaredMember
from ensemble_operator.errors import EnsembleError, InvalidSpec
from ensemble_operator.errors import Problem as SpecProblem

# Rows/s of common networks change little between these.
LANDMARKS = (1, 4, 8, 32, 128, 512)
# Torch and its libraries, where no measurement on the device class says better.
UNMEASURED_OVERHEAD_BYTES = 512 << 20


class NotUnderstood(EnsembleError):
    """What a measuring process printed is not what was agreed."""


class Signature(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The inputs and outputs that a model file tells of; None where it does not.

    `fixed_batch` is the only number of rows that the model takes; None if it takes others, too.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[TensorSpec, ...] | None = None
    fixed_batch: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the file tells neither."""
        return self.inputs is None and self.outputs is None


class Point(msgspec.Struct, frozen=True, rename="camel"):
    """One batch size of one member on one device class: `memory_bytes` is what the instance adds to an idle worker.

    `latency_s` is the median of a batch, `spread` is from the 10th to the 90th percentile, over the median.
    """

    batch_size: int
    rows_per_s: float
    latency_s: float
    memory_bytes: int
    spread: float = 0.0


class Measurement(msgspec.Struct, frozen=True, rename="camel"):
    """What is known of one member on one device class. `overhead_bytes` is an idle worker's; `error` says why it ended.

    Without points the member cannot be loaded there, and `error` is the reason.
    """

    signature: Signature = Signature()
    points: tuple[Point, ...] = ()
    overhead_bytes: int = 0
    error: str = ""

    def before(self, size: int) -> Point | None:
        """The largest batch size below this one."""
        smaller = [point for point in self.points if point.batch_size < size]
        return max(smaller, key=lambda point: point.batch_size, default=None)


class Download(msgspec.Struct, frozen=True, rename="camel"):
    """How far the download of a model is; the total is None where the server does not say."""

    downloaded_bytes: int
    total_bytes: int | None = None


class _Line(msgspec.Struct, frozen=True, rename="camel"):
    """Any line of a measuring process but those of a download: the head (signature), a point, or an error."""

    signature: Signature | None = None
    overhead_bytes: int = 0
    batch_size: int = 0
    rows_per_s: float = 0.0
    latency_s: float = 0.0
    memory_bytes: int = 0
    spread: float = 0.0
    error: str = ""


class Device(msgspec.Struct, frozen=True, rename="camel"):
    """One device of this machine. `cores` are a CPU partition's, empty for others."""

    name: str
    kind: str
    device_class: str
    capacity_bytes: int
    cores: tuple[int, ...] = ()


class _Listing(msgspec.Struct, frozen=True):
    """What `ensemble_worker devices` prints."""

    devices: tuple[Device, ...]


def devices_of(text: str) -> tuple[Device, ...]:
    """The devices in the JSON of `ensemble_worker devices`.

    Raises NotUnderstood.
    """
    try:
        return msgspec.json.decode(text, type=_Listing).devices
    except msgspec.DecodeError as error:
        raise NotUnderstood(f"the list of devices is not understood: {error}") from error


def download_of(line: str) -> Download | None:
    """What a line of a measuring process says of its download; None if it is about something else."""
    try:
        return msgspec.json.decode(line, type=Download)
    except msgspec.DecodeError:
        return None


def measurement_of(lines: Iterable[str]) -> Measurement:
    """What a measuring process found out.

    Raises NotUnderstood.
    """
    found = Measurement()
    for text in lines:
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.DecodeError as error:
            raise NotUnderstood(f"a measurement is not understood: {error}: {text[:200]}") from error
        changes: dict[str, object] = {}
        if line.signature is not None:
            changes["signature"] = line.signature
        if line.overhead_bytes:
            changes["overhead_bytes"] = line.overhead_bytes
        if line.error:
            changes["error"] = line.error
        elif line.batch_size:
            point = Point(line.batch_size, line.rows_per_s, line.latency_s, line.memory_bytes, line.spread)
            changes["points"] = (*found.points, point)
        found = msgspec.structs.replace(found, **changes)
    return found


def declared(member: DeclaredMember, device_class: str) -> Measurement:
    """What the resource itself says about a member on a device class; no points if it says nothing."""
    exact = [m for m in member.profile if m.device_class == device_class]
    points = tuple(
        Point(m.batch_size, m.batch_size / m.latency_s, m.latency_s, m.memory_bytes)
        for m in exact or [m for m in member.profile if not m.device_class]
    )
    return Measurement(points=points)


def sizes_to_measure(sizes: Sequence[int]) -> tuple[int, ...]:
    """Which of the allowed batch sizes a quick measurement tries: the smallest, and the nearest to each landmark.

    Near means in ratio; of two equally near the smaller. Ascending.
    """
    nearest = {min(sizes, key=lambda s: (abs(math.log(s / landmark)), s)) for landmark in LANDMARKS}
    return tuple(sorted(nearest | {min(sizes)}))


def agreed_tensors(
    ensemble: InferenceEnsemble, signatures: Mapping[str, Signature]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs: the resource's where it declares them, else what the models tell.

    Raises InvalidSpec if neither tells, or two models tell different things.
    """
    problems: list[SpecProblem] = []

    def agree(field: str, given: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        if given:
            return given
        told: dict[tuple[TensorSpec, ...], str] = {}
        for member, signature in signatures.items():
            specs: tuple[TensorSpec, ...] | None = getattr(signature, f"{field}s")
            if specs:
                told.setdefault(specs, member)
        if len(told) > 1:
            (first, one), (second, other) = list(told.items())[:2]
            problems.append(
                SpecProblem(
                    f"spec.{field}",
                    f"is not given, and the models differ: {one!r} has {_show(first)}, {other!r} has {_show(second)}",
                )
            )
        elif not told:
            problems.append(SpecProblem(f"spec.{field}", "is not given, and no model tells: declare it"))
        return next(iter(told), ())

    inputs, outputs = agree("input", ensemble.spec.inputs), agree("output", ensemble.spec.outputs)
    if problems:
        raise InvalidSpec(problems, ensemble.name)
    return inputs, outputs


def _show(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.datatype} {list(s.shape)}" for s in specs)
