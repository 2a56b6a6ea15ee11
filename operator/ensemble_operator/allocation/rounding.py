"""Starts for the search: an assignment of instances to pools, made a layout of whole devices.

The program over pools (see `program`) says which instances every pool should hold and how much time each needs, but
not on which of its devices. Members that need whole devices get devices of their own. What is left is packed by
decreasing size, the larger of its shares of a device's time and memory, each where the most of both is left. There are
three ways, and none is the best of every problem:

- each instance as it is, smaller only where it fits nowhere; devices with too much to do share it with devices that
  have time left;
- only the least memory of any of its batches must fit, and a device then fits the batch sizes of all that it holds
  (see `fitting`); the memory that is left is counted by the least;
- the same, counted by the batches that were wished for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ensemble_operator.allocation.fitting import fitted_row, least_needs
from ensemble_operator.allocation.layout import Layout, Line, Row
from ensemble_operator.allocation.program import Assignment
from ensemble_operator.allocation.tables import Floats, Tables

_EPSILON = 1e-6
# Instances without a time of their own are sized as if they had this share of a device's.
_IDLE = 1e-3


@dataclass(frozen=True, slots=True)
class _Item:
    """An instance to pack: its largest level and the device time that it needs."""

    member: int
    level: int
    time: float


@dataclass(slots=True)
class _Load:
    """What a pool is to hold: lines of whole devices, and the instances that share the others."""

    pool: int
    devices: int
    whole: list[Line] = field(default_factory=list)
    items: list[_Item] = field(default_factory=list)

    @property
    def shared_devices(self) -> int:
        """The devices that are shared: no more than there are instances."""
        return min(self.devices, len(self.items))


_Pack = Callable[[Tables, _Load], list[Row]]


@dataclass(slots=True)
class _Device:
    """A device being packed: time in devices, memory as a share of what is usable."""

    row: list[int]
    time: float = 1.0
    memory: float = 1.0
    items: list[_Item] = field(default_factory=list)


def rounded(tables: Tables, assignment: Assignment) -> list[Layout]:
    """Layouts near the assignment, of each way to pack it in which every member finds room."""
    if assignment.instances is None or assignment.times is None:
        return []
    loads = [
        _load(tables, pool, np.rint(instances), times)
        for pool, (instances, times) in enumerate(zip(assignment.instances, assignment.times, strict=True))
    ]
    layouts = (Layout.of(line for load in loads for line in _lines(tables, load, pack)) for pack in _WAYS)
    return [layout for layout in dict.fromkeys(layouts) if layout.instances().all()]


def _load(tables: Tables, pool: int, all_instances: Floats, all_times: Floats) -> _Load:
    load = _Load(pool, len(tables.pools[pool].devices))
    for member in range(tables.member_count):
        instances, times = all_instances[member], all_times[member]
        if max(instances.sum(), times.sum()) < _EPSILON:
            continue
        level = int(times.argmax() or instances.argmax())
        whole = min(int(times.sum() + _EPSILON), load.devices)
        if whole:
            load.devices -= whole
            row = tuple(level if m == member else 0 for m in range(tables.member_count))
            load.whole.append(Line(pool, row, whole))
        load.items.extend(_rests(member, level, instances, float(times.sum()) - whole, whole))
    return load


def _lines(tables: Tables, load: _Load, pack: _Pack) -> Iterator[Line]:
    yield from load.whole
    rows = pack(tables, load)
    yield from (Line(load.pool, row, 1) for row in rows)
    yield Line(load.pool, (0,) * tables.member_count, load.devices - len(rows))


def _rests(member: int, level: int, instances: Floats, time: float, whole: int) -> list[_Item]:
    """The instances beyond the whole devices; each takes an equal part of the time that is left."""
    levels = [i for i in range(len(instances) - 1, 0, -1) for _ in range(int(instances[i]))][whole:]
    if not levels and time > _EPSILON:
        levels = [level]
    return [_Item(member, i, max(time, 0.0) / len(levels)) for i in levels]


def _as_they_are(tables: Tables, load: _Load) -> list[Row]:
    shares = _shares(tables, load.pool)
    devices = [_Device([0] * tables.member_count) for _ in range(load.shared_devices)]
    for item in _by_size(load, shares):
        device = _place(devices, shares, item, lambda device: min(device.time, device.memory))
        if device:
            device.time -= item.time
            device.items.append(item)
    for device in devices:
        _relieve(device, devices, shares)
    return [tuple(device.row) for device in devices]


def _squeezed(tables: Tables, load: _Load, as_wished: bool) -> list[Row]:
    """Rows whose least memory fits, put where memory is left, counted by the batches `as_wished` or by the least."""
    pool, wished = load.pool, _shares(tables, load.pool)
    # In bytes: what fits exactly shall fit.
    usable, least = float(tables.pools[pool].usable_bytes), least_needs(tables, pool)
    free = np.full(load.shared_devices, usable)
    time, memory = np.ones((2, load.shared_devices))
    parts: list[dict[int, float]] = [{} for _ in range(load.shared_devices)]
    for item in _by_size(load, wished):
        lacking = np.array([item.member in part for part in parts], dtype=bool) | (free < least[item.member])
        if lacking.all():
            continue
        room = np.minimum(time, memory if as_wished else free / max(usable, 1))
        device = int(np.where(lacking, -np.inf, room).argmax())
        free[device] -= least[item.member]
        memory[device] -= wished[item.member, item.level]
        time[device] -= item.time
        parts[device][item.member] = max(item.time, _IDLE) * tables.rates[pool, item.member, item.level]
    fitted = (fitted_row(tables, pool, part, usable) for part in parts)
    return [found[0] for found in fitted if found]


def _by_size(load: _Load, shares: Floats) -> list[_Item]:
    return sorted(load.items, key=lambda i: (-max(i.time, shares[i.member, i.level]), i.member, i.level))


def _shares(tables: Tables, pool: int) -> Floats:
    """What every instance takes of a device's memory, shape (members, levels)."""
    return np.asarray(tables.needs[pool] / max(tables.pools[pool].usable_bytes, 1))


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


_WAYS: tuple[_Pack, ...] = (_as_they_are, partial(_squeezed, as_wished=False), partial(_squeezed, as_wished=True))
