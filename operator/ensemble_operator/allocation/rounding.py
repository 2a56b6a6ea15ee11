"""Starts for the search: an assignment of instances to pools, made a layout of whole devices.

The program over pools (see `program`) says which instances every pool should hold and how much time each needs, but
not on which of its devices. Members that need whole devices get devices of their own. What is left is packed by
decreasing size, the larger of its shares of a device's time and memory, each where the most of both is left; devices
with too much to do then share it with devices that have time left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ensemble_operator.allocation.layout import Layout, Line
from ensemble_operator.allocation.program import Assignment
from ensemble_operator.allocation.tables import Floats, Tables

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class _Item:
    """An instance to pack: its largest level and the device time that it needs."""

    member: int
    level: int
    time: float


@dataclass(slots=True)
class _Device:
    """A device being packed: time in devices, memory as a share of what is usable."""

    row: list[int]
    time: float = 1.0
    memory: float = 1.0
    items: list[_Item] = field(default_factory=list)


def rounded(tables: Tables, assignment: Assignment) -> Layout | None:
    """A layout near the assignment; None where some member found no room."""
    if assignment.instances is None or assignment.times is None:
        return None
    lines: list[Line] = []
    for pool in range(len(tables.pools)):
        lines.extend(_rounded_pool(tables, pool, np.rint(assignment.instances[pool]), assignment.times[pool]))
    layout = Layout.of(lines)
    return layout if layout.instances().all() else None


def _rounded_pool(tables: Tables, pool: int, all_instances: Floats, all_times: Floats) -> Iterator[Line]:
    left = len(tables.pools[pool].devices)
    items: list[_Item] = []
    for member in range(tables.member_count):
        instances, times = all_instances[member], all_times[member]
        if max(instances.sum(), times.sum()) < _EPSILON:
            continue
        level = int(times.argmax() or instances.argmax())
        whole = min(int(times.sum() + _EPSILON), left)
        if whole:
            left -= whole
            yield Line(pool, tuple(level if m == member else 0 for m in range(tables.member_count)), whole)
        items.extend(_rests(member, level, instances, float(times.sum()) - whole, whole))
    devices = _packed(tables, pool, items, min(left, len(items)))
    yield from (Line(pool, tuple(device.row), 1) for device in devices)
    yield Line(pool, (0,) * tables.member_count, left - len(devices))


def _rests(member: int, level: int, instances: Floats, time: float, whole: int) -> list[_Item]:
    """The instances beyond the whole devices; each takes an equal part of the time that is left."""
    levels = [i for i in range(len(instances) - 1, 0, -1) for _ in range(int(instances[i]))][whole:]
    if not levels and time > _EPSILON:
        levels = [level]
    return [_Item(member, i, max(time, 0.0) / len(levels)) for i in levels]


def _packed(tables: Tables, pool: int, items: list[_Item], count: int) -> list[_Device]:
    shares = tables.needs[pool] / max(tables.pools[pool].usable_bytes, 1)
    devices = [_Device([0] * tables.member_count) for _ in range(count)]
    by_size = sorted(items, key=lambda i: (-max(i.time, shares[i.member, i.level]), i.member, i.level))
    for item in by_size:
        device = _place(devices, shares, item, lambda device: min(device.time, device.memory))
        if device:
            device.time -= item.time
            device.items.append(item)
    for device in devices:
        _relieve(device, devices, shares)
    return devices


def _place(
    devices: list[_Device], shares: Floats, item: _Item, room: Callable[[_Device], float], least: float = -np.inf
) -> _Device | None:
    """Put an instance where there is most room, but more than the least, at its largest level that fits anywhere."""
    for level in range(item.level, 0, -1):
        need = float(shares[item.member, level])
        fitting = [d for d in devices if not d.row[item.member] and need <= d.memory and room(d) > least]
        if fitting:
            device = max(fitting, key=room)
            device.row[item.member] = level
            device.memory -= need
            return device
    return None


def _relieve(device: _Device, devices: list[_Device], shares: Floats) -> None:
    """Share what is too much for a device's time with others that have time and memory left."""
    for item in sorted(device.items, key=lambda item: shares[item.member, item.level]):
        if device.time >= -_EPSILON:
            return
        other = _place(devices, shares, item, lambda device: device.time, least=_EPSILON)
        if other:
            moved = min(-device.time, other.time, item.time)
            device.time += moved
            other.time -= moved
