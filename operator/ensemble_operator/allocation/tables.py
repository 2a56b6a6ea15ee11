"""A problem as arrays, with interchangeable devices pooled: what the searches compute with.

Batch sizes become *levels*: level 0 is "not placed", level i is the i-th batch size in ascending order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ensemble_operator.allocation.problem import DeviceKind, Problem

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Interchangeable devices: the same class and the same usable memory. `devices` are indices, ascending."""

    device_class: str
    kind: DeviceKind
    usable_bytes: int
    colocation: float
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tables:
    """`rates` (rows/s) and `needs` (bytes), each of shape (pools, members, levels).

    Level 0 has rate 0 and need 0. What has no profile has rate 0 and an infinite need; what is too big for an empty
    device of the pool has rate 0. `pool_of` has the pool of every device.
    """

    pools: tuple[Pool, ...]
    pool_of: Ints
    sizes: tuple[int, ...]
    rates: Floats
    needs: Floats

    @property
    def member_count(self) -> int:
        """Columns of the matrix."""
        return int(self.rates.shape[1])

    @property
    def level_count(self) -> int:
        """Batch sizes, and one for "not placed"."""
        return int(self.rates.shape[2])

    def level(self, batch_size: int) -> int:
        """The level of a batch size.

        Raises ValueError if the problem does not list it.
        """
        return self.sizes.index(batch_size)


def tables_of(problem: Problem) -> Tables:
    """The tables of a consistent problem. Pools come accelerators first, then in order of their first device."""
    sizes = (0, *sorted(problem.batch_sizes))
    pools = _pools_of(problem)
    member_index = {m.name: i for i, m in enumerate(problem.members)}
    level_index = {size: level for level, size in enumerate(sizes)}
    rates = np.zeros((len(pools), len(problem.members), len(sizes)))
    needs = np.full_like(rates, np.inf)
    needs[:, :, 0] = 0
    for profile in problem.profiles:
        member, level = member_index.get(profile.member), level_index.get(profile.batch_size)
        if member is None or level is None:
            continue
        for index, pool in enumerate(pools):
            if pool.device_class == profile.device_class:
                fits = profile.memory_bytes <= pool.usable_bytes
                rates[index, member, level] = profile.rows_per_s if fits else 0.0
                needs[index, member, level] = profile.memory_bytes
    pool_of = np.zeros(len(problem.devices), dtype=np.int64)
    for index, pool in enumerate(pools):
        pool_of[list(pool.devices)] = index
    for array in (rates, needs, pool_of):
        array.setflags(write=False)
    return Tables(pools, pool_of, sizes, rates, needs)


def _pools_of(problem: Problem) -> tuple[Pool, ...]:
    alike: dict[tuple[str, DeviceKind, int], list[int]] = defaultdict(list)
    for index, device in enumerate(problem.devices):
        alike[device.device_class, device.kind, device.usable_bytes(problem.headroom)].append(index)
    pools = [
        Pool(device_class, kind, usable, problem.colocation.get(device_class, 1.0), tuple(devices))
        for (device_class, kind, usable), devices in alike.items()
    ]
    return tuple(sorted(pools, key=lambda pool: (pool.kind == "cpu", pool.devices[0])))
