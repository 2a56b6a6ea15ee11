"""The words of a planning problem: members, devices, profiles. A `Problem` that exists is consistent.

Whether the members fit is not decided here: that takes a plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.tables import Tables, tables_of

DeviceKind = Literal["cpu", "cuda"]

DEFAULT_HEADROOM = 0.1
MAX_BATCH_SIZE = 65_536
MAX_BYTES = 1 << 60
# Beyond it, and below its reciprocal, sums of rows/s and of their reciprocals come near the ends of floating point.
_MAX_RATE = 1e100


@dataclass(frozen=True, slots=True)
class Member:
    """One DNN of the ensemble."""

    name: str


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One GPU or one CPU partition.

    `overhead_bytes` is what an idle worker holds there (CUDA context, libraries, staging buffers, row cache).
    """

    name: str
    device_class: str
    kind: DeviceKind
    capacity_bytes: int
    overhead_bytes: int = 0

    def usable_bytes(self, headroom: float) -> int:
        """What instances may take here together; negative when the overhead alone is too much."""
        return math.floor(self.capacity_bytes * (1 - headroom)) - self.overhead_bytes


@dataclass(frozen=True, slots=True)
class Profile:
    """What one instance of a member costs, alone on a device of a class, at a batch size.

    `rows_per_s` at steady state, `latency_s` of a batch, `memory_bytes` added to an idle worker.
    """

    member: str
    device_class: str
    batch_size: int
    rows_per_s: float
    latency_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Problem:
    """Everything that a plan depends on.

    `headroom` is the share of every device's capacity that stays free. `colocation` has, for a device class, the
    device time that co-located instances get together, in devices: 1 is perfect time sharing (and the default), less
    is interference, more is overlap. Profiles of members, classes or sizes that the problem lacks are ignored, so that
    one table serves many problems. A member without a profile of some class or size cannot run there.

    Raises InvalidProblem, naming every fault.
    """

    members: tuple[Member, ...]
    devices: tuple[DeviceSpec, ...]
    profiles: tuple[Profile, ...]
    batch_sizes: tuple[int, ...]
    headroom: float = DEFAULT_HEADROOM
    colocation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the problem and sort its batch sizes."""
        faults = list(_faults_of_parts(self)) or list(_faults_of_coverage(self))
        if faults:
            raise InvalidProblem(faults)
        object.__setattr__(self, "batch_sizes", tuple(sorted(self.batch_sizes)))

    @cached_property
    def tables(self) -> Tables:
        """The same as arrays, with interchangeable devices pooled."""
        return tables_of(self)


def _faults_of_parts(problem: Problem) -> Iterator[str]:
    if not problem.members:
        yield "members: at least one member is needed"
    if not problem.devices:
        yield "devices: at least one device is needed"
    if not problem.batch_sizes:
        yield "batch sizes: at least one is needed"
    yield from _duplicates("member", (m.name for m in problem.members))
    yield from _duplicates("device", (d.name for d in problem.devices))
    yield from _duplicates("batch size", problem.batch_sizes)
    yield from _duplicates("profile", ((p.member, p.device_class, p.batch_size) for p in problem.profiles))
    for size in problem.batch_sizes:
        if not 1 <= size <= MAX_BATCH_SIZE:
            yield f"batch size {size} is not in 1..{MAX_BATCH_SIZE}"
    if not 0 <= problem.headroom < 1:
        yield f"headroom {problem.headroom} is not in [0, 1): it is the share of a device's memory that stays free"
    for device_class, factor in problem.colocation.items():
        if not (math.isfinite(factor) and factor > 0):
            yield f"co-location factor {factor} of class {device_class!r} must be a finite number above 0"
    for device in problem.devices:
        yield from _faults_of_device(device)
    kinds = {(d.device_class, d.kind) for d in problem.devices}
    for device_class, count in Counter(c for c, _ in kinds).items():
        if count > 1:
            yield f"device class {device_class!r} is of kind cpu and of kind cuda: name two classes"
    for profile in problem.profiles:
        yield from _faults_of_profile(profile)


def _faults_of_device(device: DeviceSpec) -> Iterator[str]:
    where = f"device {device.name!r}"
    if device.kind not in ("cpu", "cuda"):
        yield f"{where}: kind {device.kind!r} is neither cpu nor cuda"
    if not device.capacity_bytes > 0:
        yield f"{where}: capacity must be above 0 bytes, got {device.capacity_bytes}"
    if not device.overhead_bytes >= 0:
        yield f"{where}: overhead must be at least 0 bytes, got {device.overhead_bytes}"
    if max(device.capacity_bytes, device.overhead_bytes) > MAX_BYTES:
        yield f"{where}: capacity and overhead must be at most {MAX_BYTES} bytes: is the unit right?"


def _faults_of_profile(profile: Profile) -> Iterator[str]:
    where = f"profile of {profile.member!r} on {profile.device_class!r} at batch size {profile.batch_size}"
    if profile.batch_size < 1:
        yield f"{where}: the batch size must be at least 1"
    if not (math.isfinite(profile.rows_per_s) and profile.rows_per_s > 0):
        yield f"{where}: rows/s must be a finite number above 0, got {profile.rows_per_s}"
    elif not 1 / _MAX_RATE <= profile.rows_per_s <= _MAX_RATE:
        yield f"{where}: {profile.rows_per_s} rows/s cannot be compared with others: is the unit right?"
    if not (math.isfinite(profile.latency_s) and profile.latency_s >= 0):
        yield f"{where}: latency must be a finite number of seconds, at least 0, got {profile.latency_s}"
    if not profile.memory_bytes >= 0:
        yield f"{where}: memory must be at least 0 bytes, got {profile.memory_bytes}"
    if profile.memory_bytes > MAX_BYTES:
        yield f"{where}: memory must be at most {MAX_BYTES} bytes: is the unit right?"


def _faults_of_coverage(problem: Problem) -> Iterator[str]:
    """What the profiles leave open: a class, a member or a size that nothing is known about."""
    members, sizes = {m.name for m in problem.members}, set(problem.batch_sizes)
    classes = {d.device_class for d in problem.devices}
    known = [p for p in problem.profiles if p.member in members and p.device_class in classes and p.batch_size in sizes]
    measured = sorted({p.device_class for p in problem.profiles})
    for device_class in sorted(classes - {p.device_class for p in known}):
        yield f"device class {device_class!r} has no profile of any member; there are profiles for {measured or 'none'}"
    for member in sorted(members - {p.member for p in known}):
        yield f"member {member!r} has no profile at a listed batch size on any device class of the problem"
    for size in sorted(sizes - {p.batch_size for p in known}):
        yield f"batch size {size} can be run by no member on any device class: drop it or profile it"


def _duplicates(what: str, names: Iterable[object]) -> Iterator[str]:
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{what} {name!r} is listed {count} times"
