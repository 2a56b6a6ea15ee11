"""The allocation matrix: devices x members, a cell is a batch size, 0 is "not placed"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Ints


class Cell(NamedTuple):
    """An instance: a member on a device with a batch size in rows."""

    device: str
    member: str
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """An immutable value. `sizes` has shape (devices, members) and is read-only.

    Raises ValueError if the shape does not agree with the names or a cell is negative.
    """

    devices: tuple[str, ...]
    members: tuple[str, ...]
    sizes: Ints

    def __post_init__(self) -> None:
        """Keep a read-only copy, so that nobody can change a value that is hashed."""
        sizes = np.array(self.sizes, dtype=np.int64)
        if sizes.shape != (len(self.devices), len(self.members)):
            raise ValueError(f"{sizes.shape} is not {len(self.devices)} devices x {len(self.members)} members")
        if sizes.size and sizes.min() < 0:
            raise ValueError("a batch size is below 0")
        sizes.setflags(write=False)
        object.__setattr__(self, "sizes", sizes)

    @classmethod
    def empty(cls, problem: Problem) -> Matrix:
        """The matrix of a problem with nothing placed."""
        return cls.of(problem, np.zeros((len(problem.devices), len(problem.members)), dtype=np.int64))

    @classmethod
    def of(cls, problem: Problem, sizes: Ints | Sequence[Sequence[int]]) -> Matrix:
        """A matrix over a problem's devices and members, in the problem's order."""
        devices, members = tuple(d.name for d in problem.devices), tuple(m.name for m in problem.members)
        return cls(devices, members, np.asarray(sizes, dtype=np.int64).reshape(len(devices), len(members)))

    def cells(self) -> Iterator[Cell]:
        """The instances, device by device."""
        for device, member in np.argwhere(self.sizes):
            yield Cell(self.devices[device], self.members[member], int(self.sizes[device, member]))

    @property
    def instance_count(self) -> int:
        """How many cells are not 0."""
        return int(np.count_nonzero(self.sizes))

    def row(self, device: int) -> dict[str, int]:
        """Batch size by member on a device, members in order, only those placed there."""
        return {self.members[m]: int(self.sizes[device, m]) for m in np.flatnonzero(self.sizes[device])}

    def column(self, member: int) -> dict[str, int]:
        """Batch size by device of a member: more than one entry, and it is data-parallel."""
        return {self.devices[d]: int(self.sizes[d, member]) for d in np.flatnonzero(self.sizes[:, member])}

    def with_cell(self, device: int, member: int, batch_size: int) -> Matrix:
        """The same matrix with one cell changed."""
        sizes = self.sizes.copy()
        sizes[device, member] = batch_size
        return Matrix(self.devices, self.members, sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Matrix):
            return NotImplemented
        same_names = self.devices == other.devices and self.members == other.members
        return same_names and np.array_equal(self.sizes, other.sizes)

    def __hash__(self) -> int:
        return hash((self.devices, self.members, self.sizes.tobytes()))
