"""Why a matrix is what it is: memory and time of every device, the use of every instance, the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble_operator.allocation.errors import MIB
from ensemble_operator.allocation.layout import layout_of
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import free_bytes, used_bytes
from ensemble_operator.allocation.no_more import NoMore
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.tables import Bools, Floats
from ensemble_operator.allocation.throughput import Solution, solve, time_limits, times_of

# A device or member is part of the bottleneck when its price is above this share of the largest.
_PRICED = 1e-6


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A matrix row: bytes that its instances take and leave, and the share of its time that the plan needs.

    `why_unused` is empty for a device that holds something.
    """

    device: str
    used_bytes: int
    free_bytes: int
    utilisation: float
    is_bottleneck: bool
    why_unused: str = ""


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """A matrix cell: rows/s that it answers in the plan and could answer alone, its share of device time, and why."""

    device: str
    member: str
    batch_size: int
    rows_per_s: float
    alone_rows_per_s: float
    device_time: float
    why: str


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What limits the ensemble. A member's price is its part in the limit; prices sum to 1.

    `no_more` says of each member why it has no further instance.
    """

    devices: tuple[str, ...]
    members: tuple[str, ...]
    prices: tuple[float, ...]
    why: str
    no_more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that `ensemble plan --explain` says; `text` says it."""

    devices: tuple[DeviceUse, ...]
    instances: tuple[InstanceUse, ...]
    bottleneck: Bottleneck
    tried: tuple[str, ...]

    def text(self) -> str:
        """The explanation as lines for a person."""
        lines = [f"Bottleneck: {self.bottleneck.why}"]
        lines += [f"  {line}" for line in self.bottleneck.no_more]
        lines += ["", "What was tried:", *(f"  {line}" for line in self.tried)]
        by_device: dict[str, list[InstanceUse]] = {}
        for instance in self.instances:
            by_device.setdefault(instance.device, []).append(instance)
        for use in self.devices:
            mark = ", bottleneck" if use.is_bottleneck else ""
            memory = f"{use.used_bytes / MIB:.0f} MiB used, {use.free_bytes / MIB:.0f} MiB free"
            lines += ["", f"{use.device}: {memory}, {use.utilisation:.0%} of its time{mark}"]
            lines += [f"  {i.member} x{i.batch_size}: {i.why}" for i in by_device.get(use.device, [])]
            lines += [f"  {use.why_unused}"] if use.why_unused else []
        return "\n".join(lines)


def explain(problem: Problem, matrix: Matrix, tried: tuple[str, ...]) -> Explanation:
    """The explanation of a feasible matrix."""
    tables = problem.tables
    layout = layout_of(problem, matrix)
    solution = solve(tables, layout)
    index = {(line.pool, line.row): at for at, line in enumerate(layout.lines)}
    levels = np.searchsorted(np.asarray(tables.sizes), matrix.sizes)
    line_of = [index[int(p), tuple(row)] for p, row in zip(tables.pool_of, levels.tolist(), strict=True)]
    counts = np.array([line.devices for line in layout.lines])
    # Parts that are faster than the slowest only work as much as the slowest lets them.
    slowed = solution.rows_per_s / np.where(solution.reach > 0, solution.reach, np.inf)
    times = (times_of(tables, layout) * slowed / counts[:, None])[line_of]
    rates = tables.rates[tables.pool_of[:, None], np.arange(tables.member_count)[None, :], levels]
    limits = time_limits(tables, tables.pool_of, rates)
    priced = solution.prices > _PRICED * max(solution.prices.max(), _PRICED)
    is_bottleneck = np.asarray(np.any(rates[:, priced] > 0, axis=1), dtype=np.bool_)
    used, free = used_bytes(problem, matrix), free_bytes(problem, matrix)
    no_more = NoMore(problem, matrix, np.where(priced, solution.prices, 0), solution.rows_per_s)
    devices = tuple(
        DeviceUse(
            d.name,
            int(used[i]),
            int(free[i]),
            float(times[i].sum() / limits[i]),
            bool(is_bottleneck[i]),
            "" if matrix.sizes[i].any() else no_more.of_unused(i),
        )
        for i, d in enumerate(problem.devices)
    )
    instances = _instances(problem, matrix, times, rates, free)
    return Explanation(devices, instances, _bottleneck(problem, matrix, solution, is_bottleneck, no_more), tried)


def _instances(problem: Problem, matrix: Matrix, times: Floats, rates: Floats, free: Floats) -> tuple[InstanceUse, ...]:
    answered = times * rates
    total = answered.sum(axis=0)
    found = []
    for device, member in np.argwhere(matrix.sizes):
        time, rate = float(times[device, member]), float(rates[device, member])
        share = answered[device, member] / total[member] if total[member] else 0.0
        why = _why_used(share, time, rate * time, rate) + _why_this_size(problem, matrix, device, member, free[device])
        found.append(
            InstanceUse(
                matrix.devices[device],
                matrix.members[member],
                int(matrix.sizes[device, member]),
                rate * time,
                rate,
                time,
                why,
            )
        )
    return tuple(found)


def _why_used(share: float, time: float, answered: float, alone: float) -> str:
    if share < 1e-9:
        return f"a further copy, for when another is busy or lost (alone {alone:.6g} rows/s)"
    part = "all of its rows" if share > 1 - 1e-9 else f"{share:.0%} of its rows"
    return f"answers {part}, {answered:.6g} rows/s, in {time:.0%} of the device's time (alone {alone:.6g} rows/s)"


def _why_this_size(problem: Problem, matrix: Matrix, device: int, member: int, free: float) -> str:
    tables = problem.tables
    pool, level = tables.pool_of[device], tables.level(int(matrix.sizes[device, member]))
    rates, needs = tables.rates[pool, member], tables.needs[pool, member]
    best = int(rates.argmax())
    if rates[level] >= rates[best]:
        return "; its fastest batch size here"
    missing = needs[best] - needs[level] - free
    gain = f"batch size {tables.sizes[best]} would be {rates[best] / rates[level] - 1:.0%} faster"
    if missing > 0:
        return f"; {gain}, but lacks {-int(-missing // MIB)} MiB here"
    return f"; {gain}, but the ensemble does not need it"


def _bottleneck(
    problem: Problem, matrix: Matrix, solution: Solution, is_bottleneck: Bools, no_more: NoMore
) -> Bottleneck:
    priced = np.flatnonzero(solution.prices > _PRICED * max(solution.prices.max(), _PRICED))
    members = sorted(priced, key=lambda m: -solution.prices[m])
    names = [problem.members[m].name for m in members]
    devices = [name for name, limits in zip(matrix.devices, is_bottleneck, strict=True) if limits]
    why = (
        f"the time of {_listed(devices, 'device')} is used up by {_listed(names, 'member')}, "
        f"which together reach {solution.rows_per_s:.6g} rows/s"
    )
    prices = tuple(float(solution.prices[m]) for m in members)
    return Bottleneck(tuple(devices), tuple(names), prices, why, tuple(no_more.of_member(int(m)) for m in members))


def _listed(names: list[str], what: str, most: int = 8) -> str:
    shown = ", ".join(names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}{'s' if len(names) > 1 else ''} {shown}{more}"
