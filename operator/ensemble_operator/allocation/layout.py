"""A matrix with interchangeable devices merged: how many devices of each pool hold which row.

What a plan is worth does not depend on which device of a pool holds a row, so the searches work on layouts: a thousand
devices are a few dozen lines, and permuting the devices of a pool changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import levels_of
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Floats, Ints, Tables

Row = tuple[int, ...]


class Line(NamedTuple):
    """Devices of a pool that hold the same row of levels, one level for every member."""

    pool: int
    row: Row
    devices: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Lines in canonical order, no two alike, none empty of devices: equal layouts are equal values."""

    lines: tuple[Line, ...]

    @classmethod
    def of(cls, lines: Iterable[Line]) -> Layout:
        """The layout of lines in any order; lines that hold the same are merged."""
        counts: Counter[tuple[int, Row]] = Counter()
        for pool, row, count in lines:
            counts[pool, row] += count
        return cls(tuple(Line(pool, row, count) for (pool, row), count in sorted(counts.items()) if count))

    @classmethod
    def empty(cls, tables: Tables) -> Layout:
        """All devices, nothing placed."""
        row = (0,) * tables.member_count
        return cls.of(Line(index, row, len(pool.devices)) for index, pool in enumerate(tables.pools))

    def changed(self, changes: Iterable[tuple[int, Row, int]]) -> Layout:
        """With `count` devices of the line at each given index holding a new row instead."""
        lines = list(self.lines)
        for index, row, count in changes:
            line = lines[index]
            lines[index] = line._replace(devices=line.devices - count)
            lines.append(Line(line.pool, row, count))
        return Layout.of(lines)

    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """Pools (lines), levels (lines, members) and counts (lines)."""
        pools, rows, counts = zip(*self.lines, strict=True)
        return np.array(pools), np.array(rows), np.array(counts)

    def instances(self) -> Ints:
        """Instances of every member."""
        _, levels, counts = self.arrays()
        return np.asarray(counts @ (levels > 0))


def line_rates(tables: Tables, pools: Ints, levels: Ints) -> Floats:
    """Rows/s of every cell alone on its device, shape (lines, members); 0 where nothing is placed."""
    return np.asarray(tables.rates[pools[:, None], np.arange(tables.member_count)[None, :], levels])


def line_needs(tables: Tables, pools: Ints, levels: Ints) -> Floats:
    """Bytes of every cell, shape (lines, members)."""
    return np.asarray(tables.needs[pools[:, None], np.arange(tables.member_count)[None, :], levels])


def layout_of(problem: Problem, matrix: Matrix) -> Layout:
    """The layout of a matrix over the problem's devices and members.

    Raises ValueError if a batch size is none of the problem's.
    """
    levels = levels_of(problem, matrix)
    if (levels < 0).any():
        strange = sorted({int(size) for size in matrix.sizes[levels < 0]})
        raise ValueError(f"the matrix holds batch sizes {strange}, which the problem does not list")
    pools = problem.tables.pool_of
    return Layout.of(Line(int(pool), tuple(row), 1) for pool, row in zip(pools, levels.tolist(), strict=True))


def matrix_of(problem: Problem, layout: Layout) -> Matrix:
    """A matrix of this layout: in every pool the fullest lines come first, on the devices listed first."""
    tables = problem.tables
    sizes = np.zeros((len(problem.devices), len(problem.members)), dtype=np.int64)
    by_pool: dict[int, list[Line]] = defaultdict(list)
    for line in layout.lines:
        by_pool[line.pool].append(line)
    for pool, lines in by_pool.items():
        devices = iter(tables.pools[pool].devices)
        for line in sorted(lines, key=lambda line: line.row, reverse=True):
            row = [tables.sizes[level] for level in line.row]
            for _ in range(line.devices):
                sizes[next(devices)] = row
    return Matrix.of(problem, sizes)
