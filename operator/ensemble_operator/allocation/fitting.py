"""Batch sizes for members that share a device whose memory is short.

A device that holds a set of members wants, within its memory, the batch sizes with which its part of their rows takes
the least time: those of the least memory first, then whatever saves most time a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ensemble_operator.allocation.layout import Row
from ensemble_operator.allocation.tables import Floats, Tables


def fitted_row(tables: Tables, pool: int, parts: Mapping[int, float], usable_bytes: float) -> tuple[Row, float] | None:
    """The batch sizes of members on a device, and the time that their parts of all rows take; None if they do not fit.

    `parts` has, by member, the rows that the device answers for each row of the ensemble.
    """
    if not parts:
        return (0,) * tables.member_count, 0.0
    members = list(parts)
    # Plain numbers: a loop over so few reads them several times as fast as an array's.
    needs, rates = tables.needs[pool, members].tolist(), tables.rates[pool, members].tolist()
    costs = [_Costs(part, *both) for part, *both in zip(parts.values(), needs, rates, strict=True)]
    held = [each.least_level() for each in costs]
    left = usable_bytes - sum(each[level] for each, level in zip(needs, held, strict=True))
    if not all(held) or left < 0:
        return None
    while step := _best_step(costs, held, left):
        index, level = step
        left -= needs[index][level] - needs[index][held[index]]
        held[index] = level
    row = [0] * tables.member_count
    for member, level in zip(members, held, strict=True):
        row[member] = level
    return tuple(row), sum(each.part / each.rates[level] for each, level in zip(costs, held, strict=True))


def least_needs(tables: Tables, pool: int) -> Floats:
    """The least bytes of every member at any batch; infinite where it cannot run."""
    return np.asarray(np.where(tables.rates[pool] > 0, tables.needs[pool], np.inf).min(axis=1))


class _Costs(NamedTuple):
    """A member on the device: its part of the rows; bytes and rows/s by level."""

    part: float
    needs: list[float]
    rates: list[float]

    def least_level(self) -> int:
        """The level of least memory, the smallest of equals; 0 if the member cannot run."""
        able = [level for level, rate in enumerate(self.rates) if rate > 0]
        return min(able, key=lambda level: self.needs[level], default=0)


def _best_step(costs: list[_Costs], held: list[int], left: float) -> tuple[int, int] | None:
    """The faster batch that saves most time a byte, of those that fit."""
    best, best_worth = None, 0.0
    for index, ((part, needs, rates), now) in enumerate(zip(costs, held, strict=True)):
        need, rate = needs[now], rates[now]
        for level in range(1, len(rates)):
            if rates[level] <= rate or needs[level] - need > left:
                continue
            worth = part * (1 / rate - 1 / rates[level]) / max(needs[level] - need, 1.0)
            if worth > best_worth:
                best, best_worth = (index, level), worth
    return best
