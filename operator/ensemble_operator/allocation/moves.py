"""Neighbours of a layout that follow its bottleneck, with a bound for each that needs no solving.

With the bottleneck's prices a device earns what the best use of its time is worth. Only a device that would earn more
can raise the throughput (see `throughput`), so a move puts there what earns more, and where memory is short makes
room: another instance of the device runs with a smaller batch, goes away, or goes to a device that has room for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ensemble_operator.allocation.layout import Layout, Row, line_needs, line_rates
from ensemble_operator.allocation.tables import Floats, Tables
from ensemble_operator.allocation.throughput import Solution, earnings, time_limits

Change = tuple[int, Row, int]

# Where an instance that makes room may go: so many of the devices with the most memory left are tried.
_NEW_HOMES = 3


class Move(NamedTuple):
    """Changes of one or two lines: at line index, so many devices hold a new row."""

    changes: tuple[Change, ...]


class Surroundings:
    """What the moves from a layout are computed from. Arrays have a first axis of lines."""

    def __init__(self, tables: Tables, layout: Layout, solution: Solution) -> None:
        self.tables, self.layout, self.solution = tables, layout, solution
        self.pools, self.levels, self.counts = layout.arrays()
        self.rates = line_rates(tables, self.pools, self.levels)
        self.limits = time_limits(tables, self.pools, self.rates)
        usable = np.array([pool.usable_bytes for pool in tables.pools], dtype=np.float64)
        self.free = usable[self.pools] - line_needs(tables, self.pools, self.levels).sum(axis=1)
        self.instances = layout.instances()

    def moves(self, limit: int) -> list[Move]:
        """The most promising moves, best first, at most `limit`."""
        found: list[Move] = []
        for line, member, level in self._promising(limit):
            for row, rest in self._rows_with(line, member, level):
                found.extend(Move(((line, row, count), *rest)) for count in self._counts(line, rest))
        found.extend(self._separations())
        unique = list(dict.fromkeys(found))
        bounds = self.bounds(unique).at(self.solution.prices)
        best = np.argsort(-bounds, kind="stable")[:limit]
        floor = self.solution.rows_per_s * (1 + 1e-9)
        return [unique[i] for i in best if bounds[i] > floor]

    def bounds(self, moves: Sequence[Move]) -> Bounds:
        """The bounds of moves, for any prices."""
        return Bounds(self, moves)

    def _promising(self, limit: int) -> list[tuple[int, int, int]]:
        """Cells (line, member, level) that would earn more than what their device's time is used for."""
        worth = self.tables.rates[self.pools] * self.solution.prices[None, :, None]
        used = -np.sort(-self.rates * self.solution.prices, axis=1)
        last = np.minimum(np.ceil(self.limits).astype(int), used.shape[1]) - 1
        floor = used[np.arange(len(used)), last]
        gain = worth - floor[:, None, None]
        gain[np.arange(len(used))[:, None], np.arange(used.shape[1])[None, :], self.levels] = 0
        flat = np.argsort(-gain, axis=None, kind="stable")[: 2 * limit]
        cells = np.stack(np.unravel_index(flat, gain.shape), axis=1)
        return [(int(g), int(m), int(level)) for g, m, level in cells if gain[g, m, level] > 0]

    def _counts(self, line: int, rest: tuple[Change, ...]) -> list[int]:
        """On how many of a line's devices to try a change: all, half, one; just one where another line changes too."""
        devices = int(self.counts[line])
        return [1] if rest else sorted({devices, (devices + 1) // 2, 1}, reverse=True)

    def _rows_with(self, line: int, member: int, level: int) -> Iterator[tuple[Row, tuple[Change, ...]]]:
        """Rows of a line's device with the cell set, and what must change elsewhere for it."""
        needs = self.tables.needs[self.pools[line]]
        row = list(self.layout.lines[line].row)
        missing = needs[member, level] - needs[member, row[member]] - self.free[line]
        row[member] = level
        if missing <= 0:
            yield tuple(row), ()
            return
        others = [m for m, held in enumerate(row) if held and m != member]
        for other in others:
            yield from self._rows_without(line, row, other, missing)
        yield from self._row_with_all_smaller(line, row, others, missing)

    def _rows_without(
        self, line: int, row: list[int], other: int, missing: float
    ) -> Iterator[tuple[Row, tuple[Change, ...]]]:
        """Rows in which one other member makes the room: smaller, gone, or gone to another device."""
        needs = self.tables.needs[self.pools[line], other]
        held = row[other]
        smaller = [i for i in range(1, held) if needs[i] <= needs[held] - missing]
        if smaller:
            yield (*row[:other], smaller[-1], *row[other + 1 :]), ()
        if needs[held] < missing:
            return
        without = (*row[:other], 0, *row[other + 1 :])
        if self.instances[other] > 1:
            yield without, ()
        for home in self._homes(line, other):
            yield without, (home,)

    def _row_with_all_smaller(
        self, line: int, row: list[int], others: list[int], missing: float
    ) -> Iterator[tuple[Row, tuple[Change, ...]]]:
        """The row in which all other members make room together, those that earn least first."""
        needs, worth = self.tables.needs[self.pools[line]], self.rates[line] * self.solution.prices
        row = list(row)
        for other in sorted(others, key=lambda m: (worth[m], -needs[m, row[m]])):
            held = row[other]
            least = 0 if self.instances[other] > 1 else 1
            levels = [i for i in range(least, held) if np.isfinite(needs[other, i])]
            enough = [i for i in levels if needs[other, held] - needs[other, i] >= missing]
            row[other] = max(enough, default=min(levels, default=held))
            missing -= needs[other, held] - needs[other, row[other]]
            if missing <= 0:
                yield tuple(row), ()
                return

    def _homes(self, line: int, member: int) -> Iterator[Change]:
        """Other lines that have room for an instance, each with the largest batch that fits there."""
        homes = [h for h in np.argsort(-self.free, kind="stable") if h != line and not self.levels[h, member]]
        for home in homes[:_NEW_HOMES]:
            needs = self.tables.needs[self.pools[home], member]
            fitting = [i for i in range(1, self.tables.level_count) if needs[i] <= self.free[home]]
            if fitting:
                row = list(self.layout.lines[home].row)
                row[member] = fitting[-1]
                yield int(home), tuple(row), 1

    def _separations(self) -> Iterator[Move]:
        """Where sharing a device costs time: rows without one of their instances."""
        for line, (limit, count) in enumerate(zip(self.limits, self.counts, strict=True)):
            if limit < 1:
                row = self.layout.lines[line].row
                for member in np.flatnonzero(row):
                    if self.instances[member] > 1:
                        yield Move(((line, (*row[:member], 0, *row[member + 1 :]), 1),))
                    if self.instances[member] > count:
                        yield Move(((line, (*row[:member], 0, *row[member + 1 :]), int(count)),))


class Bounds:
    """For every one of some moves a throughput that its layout cannot exceed, at any prices."""

    def __init__(self, around: Surroundings, moves: Sequence[Move]) -> None:
        changes = [change for move in moves for change in move.changes]
        self._around, self._moves = around, len(moves)
        self._owner = np.repeat(np.arange(len(moves)), [len(move.changes) for move in moves])
        self._lines = np.array([line for line, _, _ in changes], dtype=np.int64)
        self._counts = np.array([count for _, _, count in changes], dtype=np.int64)
        pools = around.pools[self._lines]
        rows = np.array([row for _, row, _ in changes], dtype=np.int64).reshape(-1, around.tables.member_count)
        self._rates = line_rates(around.tables, pools, rows)
        self._limits = time_limits(around.tables, pools, self._rates)

    def at(self, prices: Floats) -> Floats:
        """The bounds, shape (moves)."""
        around = self._around
        earned = earnings(around.rates, around.limits, prices)
        gains = (earnings(self._rates, self._limits, prices) - earned[self._lines]) * self._counts
        return np.asarray(around.counts @ earned + np.bincount(self._owner, weights=gains, minlength=self._moves))


def together(moves: Sequence[Move]) -> Move:
    """The moves that touch lines no earlier move touches, as one: for bottlenecks that only fall together."""
    touched: set[int] = set()
    changes: list[Change] = []
    for move in moves:
        lines = {line for line, _, _ in move.changes}
        if not lines & touched:
            touched |= lines
            changes.extend(move.changes)
    return Move(tuple(changes))
