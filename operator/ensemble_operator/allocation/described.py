"""Clusters that are not here, as documents: devices by class and count, members by facts or by profiles.

A member's cost is measured (`profiles`) or estimated from public facts by a roofline, for planning examples and
capacity questions. With b rows, t the class's `tflops`, g its `gbPerS` and l its `launchMs`, an instance takes

    seconds = l / 1000 + b * 2 * gmacs / (1000 * t) + 4 * parametersMillion / (1000 * g)
    bytes   = 4 * parametersMillion * 1e6 + b * 4 * activationsMillion * 1e6

for FP32: launches, arithmetic, reading the weights once a batch. Measured profiles win over estimates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_operator.allocation.errors import MIB, InvalidProblem
from ensemble_operator.allocation.problem import DEFAULT_HEADROOM, DeviceSpec, Member, Problem, Profile

_DEVICE_FIELDS = {"class": str, "kind": str, "count": int, "counts": list, "capacityMiB": int, "overheadMiB": int}
_DEVICE_FIELDS |= {"colocation": float, "tflops": float, "gbPerS": float, "launchMs": float}
_MEMBER_FIELDS = {"name": str, "parametersMillion": float, "gmacs": float, "activationsMillion": float}
_PROFILE_FIELDS = {"member": str, "deviceClass": str, "batchSize": int, "rowsPerS": float, "latencyS": float}
_PROFILE_FIELDS |= {"memoryBytes": int}
_FIELDS = {"name": str, "source": str, "batchSizes": list, "headroom": float, "devices": list, "members": list}
_FIELDS |= {"profiles": list}

_MAX_DEVICES = 100_000
# Of a figure for an estimate, in the figure's own unit: far beyond any network or device.
_MAX_FIGURE = 1e9


@dataclass(frozen=True, slots=True)
class Described:
    """A described cluster and ensemble. `source` says where its figures come from.

    `problems` has one problem for each entry of `counts`, labelled like `4 x v100 + 2 x cpu`, or a single one.
    """

    name: str
    source: str
    problems: tuple[tuple[str, Problem], ...]


class _Fault(Exception):
    """Something in a document, with its path."""


def described(document: object) -> Described:
    """The cluster of a parsed YAML or JSON document.

    Raises InvalidProblem with the path of what is wrong.
    """
    try:
        return _described(document)
    except _Fault as fault:
        raise InvalidProblem([str(fault)]) from None


def _described(document: object) -> Described:
    top = _fields(document, "document", _FIELDS, required=("name", "source", "batchSizes", "devices", "members"))
    sizes = tuple(_typed(size, int, f"batchSizes[{i}]") for i, size in enumerate(top["batchSizes"]))
    devices = list(_items(top, "devices", _DEVICE_FIELDS, ("class", "kind", "capacityMiB")))
    if not devices:
        raise _Fault("devices: at least one device is needed")
    members = list(_items(top, "members", _MEMBER_FIELDS, ("name",)))
    measured = [_profile(entry) for entry in _items(top, "profiles", _PROFILE_FIELDS, tuple(_PROFILE_FIELDS))]
    known = {(p.member, p.device_class, p.batch_size) for p in measured}
    estimated = [
        p for p in _estimates(devices, members, sizes) if (p.member, p.device_class, p.batch_size) not in known
    ]
    problems = []
    for counts in _series(devices):
        listed = zip(counts, devices, strict=True)
        label = " + ".join(f"{count} x {device['class']}" for count, device in listed if count)
        problem = Problem(
            members=tuple(Member(member["name"]) for member in members),
            devices=tuple(_device_specs(devices, counts)),
            profiles=(*measured, *estimated),
            batch_sizes=sizes,
            headroom=top.get("headroom", DEFAULT_HEADROOM),
            colocation={device["class"]: device["colocation"] for device in devices if "colocation" in device},
        )
        problems.append((label, problem))
    return Described(top["name"], top["source"], tuple(problems))


def _series(devices: list[dict[str, Any]]) -> list[list[int]]:
    """The counts of all classes, once for every entry of the one class that has `counts`."""
    series = [index for index, device in enumerate(devices) if "counts" in device]
    if len(series) > 1:
        raise _Fault(f"devices[{series[1]}].counts: only one class may have several counts")
    for index, device in enumerate(devices):
        if ("count" in device) == ("counts" in device):
            raise _Fault(f"devices[{index}]: exactly one of count and counts is needed")
    wanted = devices[series[0]]["counts"] if series else [0]
    if not wanted:
        raise _Fault(f"devices[{series[0]}].counts: at least one count is needed")
    path = f"devices[{series[0]}].counts" if series else "devices"
    rows = [
        [
            _typed(count, int, f"{path}[{i}]") if index in series else device["count"]
            for index, device in enumerate(devices)
        ]
        for i, count in enumerate(wanted)
    ]
    for row in rows:
        if min(row) < 0 or not 1 <= sum(row) <= _MAX_DEVICES:
            raise _Fault(f"{path}: counts must not be negative, with 1 to {_MAX_DEVICES} devices together, got {row}")
    return rows


def _device_specs(devices: list[dict[str, Any]], counts: list[int]) -> Iterator[DeviceSpec]:
    for device, count in zip(devices, counts, strict=True):
        for index in range(count):
            capacity, overhead = device["capacityMiB"] * MIB, device.get("overheadMiB", 0) * MIB
            yield DeviceSpec(f"{device['class']}-{index}", device["class"], device["kind"], capacity, overhead)


def _estimates(
    devices: list[dict[str, Any]], members: list[dict[str, Any]], sizes: tuple[int, ...]
) -> Iterator[Profile]:
    """Profiles by the roofline, where both the class and the member have the figures for it."""
    for device in devices:
        for member in members:
            if {"tflops", "gbPerS"} <= device.keys() and {
                "parametersMillion",
                "gmacs",
                "activationsMillion",
            } <= member.keys():
                for size in sizes:
                    yield _estimate(device, member, size)


def _estimate(device: Mapping[str, Any], member: Mapping[str, Any], size: int) -> Profile:
    weights = 4e6 * member["parametersMillion"]
    arithmetic_s = size * 2e9 * member["gmacs"] / (1e12 * device["tflops"])
    latency_s = device.get("launchMs", 0.0) / 1e3 + arithmetic_s + weights / (1e9 * device["gbPerS"])
    memory = weights + size * 4e6 * member["activationsMillion"]
    return Profile(member["name"], device["class"], size, size / latency_s, latency_s, int(memory))


def _profile(entry: Mapping[str, Any]) -> Profile:
    where = entry["member"], entry["deviceClass"], entry["batchSize"]
    return Profile(*where, entry["rowsPerS"], entry["latencyS"], entry["memoryBytes"])


def _items(
    top: Mapping[str, Any], field: str, types: Mapping[str, type], required: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    for index, entry in enumerate(top.get(field, [])):
        yield _fields(entry, f"{field}[{index}]", types, required)


def _fields(value: object, path: str, types: Mapping[str, type], required: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a mapping, each of its type; figures of an estimate must be finite, and most of them above 0."""
    if not isinstance(value, Mapping):
        raise _Fault(f"{path}: expected a mapping, got {_kind(value)}")
    for key in value:
        if key not in types:
            raise _Fault(f"{path}.{key}: unknown field; known are {', '.join(types)}")
    for key in required:
        if key not in value:
            raise _Fault(f"{path}.{key}: missing")
    found = {key: _typed(value[key], types[key], f"{path}.{key}") for key in value}
    for key in ("tflops", "gbPerS", "parametersMillion", "gmacs"):
        if key in found and not 0 < found[key] <= _MAX_FIGURE:
            raise _Fault(f"{path}.{key}: must be a finite number above 0 and at most {_MAX_FIGURE:g}, got {found[key]}")
    for key in ("activationsMillion", "launchMs"):
        if key in found and not 0 <= found[key] <= _MAX_FIGURE:
            raise _Fault(f"{path}.{key}: must be a finite number from 0 to {_MAX_FIGURE:g}, got {found[key]}")
    return found


def _typed(value: object, wanted: type, path: str) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise _Fault(f"{path}: the number is too large")
        return float(value)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise _Fault(f"{path}: expected {_KINDS[wanted]}, got {_kind(value)}")
    return value


_KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list"}


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
