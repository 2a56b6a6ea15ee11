"""The plain rules: worst-fit decreasing, and filling what memory is left with further instances.

Worst-fit decreasing: arXiv 2208.14049, algorithm 1. Both are deterministic: ties go to the name or index that is first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ensemble_operator.allocation.errors import DoesNotFit
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import free_bytes, levels_of
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Bools, Floats, Ints

# A smaller batch that is almost as fast has less latency and less memory.
GOOD_ENOUGH = 0.95

BatchSizeOf = Callable[[str, str], int]


def worst_fit(problem: Problem) -> Matrix:
    """Every member once, at its smallest batch size: largest first, each to the device with the most memory left.

    Accelerators come before CPUs. Raises DoesNotFit with the first member that finds no room.
    """
    tables = problem.tables
    sizes = np.zeros((len(problem.devices), len(problem.members)), dtype=np.int64)
    free = np.array([d.usable_bytes(problem.headroom) for d in problem.devices], dtype=np.float64)
    is_cpu = _is_cpu(problem)
    smallest = _smallest_levels(problem)
    for member in _decreasing(problem):
        levels = smallest[:, member][tables.pool_of]
        needs = tables.needs[tables.pool_of, member, levels]
        candidates = np.flatnonzero((levels > 0) & (needs <= free))
        if candidates.size == 0:
            raise _does_not_fit(problem, member, levels, needs, free)
        # lexsort orders by its last key first: accelerators, then most free, then the first device.
        chosen = candidates[np.lexsort((candidates, -free[candidates], is_cpu[candidates]))[0]]
        sizes[chosen, member] = tables.sizes[levels[chosen]]
        free[chosen] -= needs[chosen]
    return Matrix.of(problem, sizes)


def preferred_batch_size(problem: Problem) -> BatchSizeOf:
    """The rule (member, device class) -> smallest measured size with at least 0.95 of the best rows/s; 0 if none."""
    best: dict[tuple[str, str], int] = {}
    rates: dict[tuple[str, str], list[tuple[int, float]]] = {}
    listed = set(problem.batch_sizes)
    for profile in problem.profiles:
        if profile.batch_size in listed:
            rates.setdefault((profile.member, profile.device_class), []).append(
                (profile.batch_size, profile.rows_per_s)
            )
    for key, points in rates.items():
        enough = GOOD_ENOUGH * max(rate for _, rate in points)
        best[key] = min(size for size, rate in points if rate >= enough)
    return lambda member, device_class: best.get((member, device_class), 0)


def fill(
    problem: Problem, matrix: Matrix, batch_size_of: BatchSizeOf | None = None, copies: int | None = None
) -> Matrix:
    """The matrix with its cells raised to their preferred sizes, then with further instances, while memory lasts.

    Members take turns, the one with the fewest instances first; each turn goes to the device without the member that
    has the most memory left, accelerators before CPUs. `copies` bounds the instances of a member. What does not fit at
    its preferred size (by default `preferred_batch_size`) is placed at the largest smaller one that does. Raises
    ValueError if `batch_size_of` names a size that the problem does not list.
    """
    tables, is_cpu = problem.tables, _is_cpu(problem)
    prefer = _preferred_levels(problem, batch_size_of or preferred_batch_size(problem))
    levels, free = levels_of(problem, matrix).copy(), free_bytes(problem, matrix)
    order = _decreasing(problem)

    def place(member: int, open_devices: Ints) -> bool:
        """Place or raise the member on the best of these devices, in `levels` and `free`; False if nowhere."""
        needs = tables.needs[tables.pool_of[open_devices], member]
        held = levels[open_devices, member]
        added = needs - np.take_along_axis(needs, held[:, None], axis=1)
        steps = np.arange(tables.level_count)
        allowed = (added <= free[open_devices, None]) & (steps <= prefer[open_devices, member, None])
        best = np.where(allowed, steps, 0).max(axis=1)
        candidates = np.flatnonzero(best > held)
        if candidates.size == 0:
            return False
        devices = open_devices[candidates]
        first = candidates[np.lexsort((devices, -free[devices], is_cpu[devices]))[0]]
        levels[open_devices[first], member] = best[first]
        free[open_devices[first]] -= added[first, best[first]]
        return True

    for member in order:
        for device in np.flatnonzero(levels[:, member]):
            place(member, np.array([device]))
    closed: set[int] = set()
    limit = len(problem.devices) if copies is None else copies
    counts = np.count_nonzero(levels, axis=0)
    while open_members := [m for m in order if m not in closed and counts[m] < limit]:
        member = min(open_members, key=lambda m: counts[m])
        if place(member, np.flatnonzero(levels[:, member] == 0)):
            counts[member] += 1
        else:
            closed.add(member)
    return Matrix.of(problem, np.asarray(tables.sizes)[levels])


def _preferred_levels(problem: Problem, batch_size_of: BatchSizeOf) -> Ints:
    tables = problem.tables
    by_pool = [
        [tables.level(batch_size_of(member.name, pool.device_class)) for member in problem.members]
        for pool in tables.pools
    ]
    return np.array(by_pool, dtype=np.int64)[tables.pool_of]


def _is_cpu(problem: Problem) -> Bools:
    return np.array([d.kind == "cpu" for d in problem.devices])


def _smallest_levels(problem: Problem) -> Ints:
    """The smallest profiled level of every member on every pool, shape (pools, members); 0 where there is none."""
    return np.asarray((np.isfinite(problem.tables.needs[:, :, 1:])).argmax(axis=2) + 1) * _has_profile(problem)


def _has_profile(problem: Problem) -> Ints:
    return np.asarray(np.isfinite(problem.tables.needs[:, :, 1:]).any(axis=2), dtype=np.int64)


def _decreasing(problem: Problem) -> list[int]:
    """Members by decreasing memory at their smallest batch size (the largest over the pools), then by name."""
    levels = _smallest_levels(problem)
    needs = np.take_along_axis(problem.tables.needs, levels[:, :, None], axis=2)[:, :, 0].max(axis=0)
    return sorted(range(len(problem.members)), key=lambda m: (-needs[m], problem.members[m].name))


def _does_not_fit(problem: Problem, member: int, levels: Ints, needs: Floats, free: Floats) -> DoesNotFit:
    known = np.flatnonzero(levels > 0)
    device = int(known[np.argmax(free[known])])
    size = problem.tables.sizes[levels[device]]
    name = problem.members[member].name
    return DoesNotFit(name, size, needs[device], problem.devices[device].name, free[device])
