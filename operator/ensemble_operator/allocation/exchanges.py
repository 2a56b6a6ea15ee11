"""Neighbours of a layout for when memory is short: two devices exchange instances, and both choose batch sizes anew.

A full device has no room for one instance more, so the moves that follow the prices (see `moves`) find nothing there;
what helps is another way to divide the same instances.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ensemble_operator.allocation.fitting import fitted_row, least_needs
from ensemble_operator.allocation.layout import Layout, Line
from ensemble_operator.allocation.moves import Move, Surroundings
from ensemble_operator.allocation.tables import Floats, Tables
from ensemble_operator.allocation.throughput import times_of

# So many instances go each way at most.
_MOST_EXCHANGED = 2
_MANY = 16
# Of the exchanges of two devices, so many are worked out.
_WORKED_OUT = 16
# Of the devices that limit, and of those that they exchange with, so many are tried.
_LIMITING, _PARTNERS = 4, 12
# Attempts to pack all instances in another order, and the devices up to which that is worth its time.
_ATTEMPTS, _MOST_PACKED = 8, 200


def exchanges(around: Surroundings, limit: int) -> list[Move]:
    """The most promising exchanges between devices that limit and others, best first, at most `limit`.

    Promising is by the time that the slower of the two then needs for the rows that it answers now.
    """
    parts = _parts(around)
    busy = np.where(parts > 0, parts * _seconds(around), 0).sum(axis=1)
    limiting = [int(i) for i in np.argsort(-busy, kind="stable") if busy[i] > 0][:_LIMITING]
    partners = [int(i) for i in np.argsort(busy, kind="stable")][:_PARTNERS]
    found: dict[Move, float] = {}
    for one in limiting:
        for other in partners:
            if one != other:
                found.update(
                    (move, slower) for move, slower in _between(around, parts, one, other) if slower < busy[one]
                )
    return sorted(found, key=lambda move: (found[move], move))[:limit]


def repacked(tables: Tables, layout: Layout, draw: np.random.Generator) -> Layout:
    """Every instance of the layout packed anew, in a random order near that of their sizes; the same if none fits."""
    for _ in range(_ATTEMPTS if sum(line.devices for line in layout.lines) <= _MOST_PACKED else 0):
        packed = _packed(tables, layout, draw)
        if packed is not None:
            return packed
    return layout


def _parts(around: Surroundings) -> Floats:
    """Rows that one device of each line answers of every member, for each row of the ensemble."""
    answered = times_of(around.tables, around.layout) * around.rates
    total = answered.sum(axis=0)
    return np.asarray(answered / np.where(total > 0, total, 1) / around.counts[:, None])


def _seconds(around: Surroundings) -> Floats:
    """Device time a row of every cell."""
    return np.asarray(1 / np.where(around.rates > 0, around.rates, np.inf))


def _between(around: Surroundings, parts: Floats, one: int, other: int) -> Iterator[tuple[Move, float]]:
    """Exchanges of two devices, each with the time that the slower of them then needs: the likely ones are worked out.

    Likely is by the time that the slower would need if what it takes ran at its fastest there.
    """
    tables, lines = around.tables, (one, other)
    pools = [int(around.pools[line]) for line in lines]
    usable = [float(tables.pools[pool].usable_bytes) for pool in pools]
    held = [{int(m): float(parts[line, m]) for m in np.flatnonzero(around.levels[line])} for line in lines]
    given, taken = _few(held[0].keys() - held[1].keys()), _few(held[1].keys() - held[0].keys())
    here, there = _side(around, parts, one, given, taken), _side(around, parts, other, taken, given)
    slower = np.maximum(here.seconds, there.seconds.T)
    slower[(here.needs > usable[0]) | (usable[1] < there.needs.T)] = np.inf
    slower[0, 0] = np.inf
    for at in np.argsort(slower, axis=None, kind="stable")[:_WORKED_OUT]:
        give, take = np.unravel_index(at, slower.shape)
        if not np.isfinite(slower[give, take]):
            return
        gone, come = given[int(give)], taken[int(take)]
        mine = {m: p for m, p in held[0].items() if m not in gone} | {m: held[1][m] for m in come}
        theirs = {m: p for m, p in held[1].items() if m not in come} | {m: held[0][m] for m in gone}
        rows = fitted_row(tables, pools[0], mine, usable[0]), fitted_row(tables, pools[1], theirs, usable[1])
        if rows[0] and rows[1]:
            yield Move(((one, rows[0][0], 1), (other, rows[1][0], 1))), max(rows[0][1], rows[1][1])


class _Side(NamedTuple):
    """One device after every exchange: least bytes and seconds a row. Shapes: (sets that go, sets that come)."""

    needs: Floats
    seconds: Floats


def _side(
    around: Surroundings, parts: Floats, line: int, go: list[tuple[int, ...]], come: list[tuple[int, ...]]
) -> _Side:
    """What a device would hold and need; `parts` of what comes are those of the line that has it now."""
    tables, pool, placed = around.tables, int(around.pools[line]), around.levels[line] > 0
    needs, rates = least_needs(tables, pool), tables.rates[pool].max(axis=1)
    busy = np.where(placed, parts[line] / np.where(placed, around.rates[line], 1), 0)
    added = np.where(rates > 0, parts.max(axis=0) / np.where(rates > 0, rates, 1), np.inf)
    base_needs, base_seconds = needs[placed].sum(), busy.sum()
    gone_needs, come_needs = _sums(needs, go), _sums(needs, come)
    gone_seconds, come_seconds = _sums(busy, go), _sums(added, come)
    return _Side(
        base_needs - gone_needs[:, None] + come_needs[None, :],
        base_seconds - gone_seconds[:, None] + come_seconds[None, :],
    )


def _sums(values: Floats, sets: list[tuple[int, ...]]) -> Floats:
    return np.array([sum(values[m] for m in members) for members in sets], dtype=np.float64)


def _few(members: set[int]) -> list[tuple[int, ...]]:
    """None of them, each, each two; of many only each."""
    ordered = sorted(members)
    most = _MOST_EXCHANGED if len(ordered) <= _MANY else 1
    return [few for count in range(most + 1) for few in itertools.combinations(ordered, count)]


def _packed(tables: Tables, layout: Layout, draw: np.random.Generator) -> Layout | None:
    """One attempt: each instance, large ones earlier, to a random device that has room for its least memory."""
    devices: list[tuple[int, dict[int, float]]] = [
        (line.pool, {}) for line in layout.lines for _ in range(line.devices)
    ]
    free = np.array([float(tables.pools[pool].usable_bytes) for pool, _ in devices])
    pools = np.array([pool for pool, _ in devices])
    needs = np.stack([least_needs(tables, pool) for pool in range(len(tables.pools))])
    spread = np.where(np.isfinite(needs), needs, 0).max(axis=0)
    instances = layout.instances()
    items = [m for m in range(tables.member_count) for _ in range(int(instances[m]))]
    items.sort(key=lambda m: -spread[m] * draw.uniform(0.6, 1.0))
    for member in items:
        fitting = [d for d in np.flatnonzero(needs[pools, member] <= free) if member not in devices[d][1]]
        if not fitting:
            if any(member in held for _, held in devices):
                continue
            return None
        device = int(draw.choice(fitting))
        devices[device][1][member] = 1.0 / int(instances[member])
        free[device] -= needs[pools[device], member]
    rows = (fitted_row(tables, pool, parts, float(tables.pools[pool].usable_bytes)) for pool, parts in devices)
    return Layout.of(Line(pool, row[0], 1) for (pool, _), row in zip(devices, rows, strict=True) if row)
