"""What a change did, for people. Pure."""

from __future__ import annotations

import numpy as np
from rich.console import RenderableType

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.serve.change import Allocation, Change
from ensemble_operator.tables import allocation_table


def change_lines(change: Change) -> list[RenderableType]:
    """The matrix, before only if it differs, which members changed, and what is promised."""
    if not change.steps:
        return [f"{change.name} is as wanted already"]
    parts: list[RenderableType] = []
    if change.before.rows != change.after.rows:
        parts += ["before:", _table(change.before), "now:"]
    parts.append(_table(change.after))
    named = (("added", change.added), ("removed", change.removed), ("replaced", change.replaced))
    members = "; ".join(f"{what} {', '.join(names)}" for what, names in named if names) or "the same members"
    old, new = change.before.predicted_rows_per_s, change.after.predicted_rows_per_s
    steps = "1 step" if change.steps == 1 else f"{change.steps} steps"
    parts.append(f"{change.name} changed in {steps} and {change.seconds:.1f} s: {members}")
    parts.append(f"predicted throughput: {old:,.0f} -> {new:,.0f} rows/s")
    return parts


def _table(allocation: Allocation) -> RenderableType:
    members, devices = allocation.members, tuple(allocation.rows)
    sizes = np.array([[allocation.rows[device].get(member, 0) for member in members] for device in devices])
    unplaced = [member for member, column in zip(members, sizes.T, strict=True) if not column.any()]
    return allocation_table(Matrix(devices, members, sizes), allocation.used_bytes, allocation.capacity_bytes, unplaced)
