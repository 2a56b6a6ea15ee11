"""A plan for people and for programs: the allocation matrix at a glance, and the same as a document. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ensemble_operator.allocation.errors import MIB
from ensemble_operator.allocation.planner import Plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.tables import placed

# More devices than these are shown as so many of one kind.
MAX_SINGLE_DEVICES = 8
BOTTLENECK_MARK = "◀"
_NOTHING = "·"
_COLUMN_GAP = 3
_FIGURES = ("MiB used", "MiB free", "busy")


@dataclass(frozen=True, slots=True)
class Line:
    """A matrix row, or so many equal ones. Bytes are those of one device; `utilisation` is the share of its time."""

    devices: tuple[str, ...]
    device_class: str
    row: dict[str, int]
    used_bytes: int
    free_bytes: int
    utilisation: float
    is_bottleneck: bool

    @property
    def label(self) -> str:
        """The device's name; of several their number and class."""
        return self.devices[0] if len(self.devices) == 1 else f"{len(self.devices)} x {self.device_class}"

    @property
    def figures(self) -> tuple[str, str, str]:
        """Memory of the instances, memory left for more, utilisation."""
        return f"{self.used_bytes / MIB:,.0f}", f"{self.free_bytes / MIB:,.0f}", f"{self.utilisation:.0%}"


def lines_of(problem: Problem, plan: Plan, *, collapse: bool) -> tuple[Line, ...]:
    """The matrix row by row; with `collapse`, devices of a class that hold the same are one line."""
    groups: dict[object, list[int]] = {}
    uses = plan.explanation.devices
    for index, (device, use) in enumerate(zip(problem.devices, uses, strict=True)):
        row = plan.matrix.sizes[index].tobytes()
        alike = (device.device_class, row, use.used_bytes, use.free_bytes, use.is_bottleneck)
        groups.setdefault(alike if collapse else index, []).append(index)
    return tuple(
        Line(
            tuple(problem.devices[i].name for i in indices),
            problem.devices[indices[0]].device_class,
            plan.matrix.row(indices[0]),
            uses[indices[0]].used_bytes,
            uses[indices[0]].free_bytes,
            uses[indices[0]].utilisation,
            uses[indices[0]].is_bottleneck,
        )
        for indices in groups.values()
    )


def matrix_table(problem: Problem, plan: Plan, width: int) -> Table:
    """The matrix with its figures: devices down where the members fit across `width` characters, else on its side."""
    lines = lines_of(problem, plan, collapse=len(problem.devices) > MAX_SINGLE_DEVICES)
    members = plan.matrix.members
    label_width = max(len(line.label) for line in lines) + len(BOTTLENECK_MARK) + 1
    upright = [label_width, *(max(4, len(m)) for m in members), *map(len, _FIGURES)]
    sideways = [max(map(len, members)), *(max(len(line.label), 6) + 2 for line in lines)]
    if _total(upright) <= width:
        table = _upright(lines, members)
    elif _total(sideways) <= width:
        table = _sideways(lines, members)
    else:
        table = _listing(lines)
    headroom = f"{problem.headroom:.0%} headroom" if problem.headroom else "no headroom"
    table.title, table.title_justify = "allocation matrix (batch sizes)", "left"
    table.caption = f"{BOTTLENECK_MARK} bottleneck; MiB free: beside the instances, an idle worker and {headroom}"
    table.caption_justify = "left"
    return table


def summary(plan: Plan) -> tuple[str, ...]:
    """What the plan promises, in lines."""
    worth = (
        f"predicted {_rate(plan.predicted_rows_per_s)} rows/s · bound {_rate(plan.bound_rows_per_s)} rows/s · "
        f"gap {plan.gap:.1%} · planned in {plan.seconds:.2f} s ({plan.evaluations:,} matrices scored)"
    )
    lines = [worth, f"bottleneck: {plan.bottleneck.why}"]
    if plan.measured_rows_per_s is not None:
        ratio = plan.measured_rows_per_s / plan.predicted_rows_per_s
        lines.insert(1, f"measured {_rate(plan.measured_rows_per_s)} rows/s, {ratio:.0%} of what was predicted")
    if plan.device_bound:
        used = int(plan.matrix.sizes.any(axis=1).sum())
        lines.append(f"devices: {used} of {len(plan.matrix.devices)} used; proven: at least {plan.device_bound}")
    if plan.shortfall_rows_per_s > 0:
        lines.append(f"the target is missed by {_rate(plan.shortfall_rows_per_s)} rows/s: add devices")
    return tuple(lines)


def series_table(plans: Sequence[tuple[str, Plan]]) -> Table:
    """Several plans side by side, a line each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("devices", no_wrap=True)
    for column in ("rows/s", "bound", "gap", "instances", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, plan in plans:
        figures = (_rate(plan.predicted_rows_per_s), _rate(plan.bound_rows_per_s), f"{plan.gap:.1%}")
        table.add_row(label, *figures, str(plan.matrix.instance_count), f"{plan.seconds:.2f}")
    return table


def plan_document(label: str, problem: Problem, plan: Plan, *, explain: bool) -> dict[str, Any]:
    """A plan as JSON's types. The matrix is sparse: of every device its instances, by member."""
    bottleneck = plan.bottleneck
    document: dict[str, Any] = {
        "devices": label,
        "predictedRowsPerS": plan.predicted_rows_per_s,
        "boundRowsPerS": plan.bound_rows_per_s,
        "gap": plan.gap,
        "evaluations": plan.evaluations,
        "seconds": plan.seconds,
        "bottleneck": {
            "devices": list(bottleneck.devices),
            "members": list(bottleneck.members),
            "prices": list(bottleneck.prices),
            "why": bottleneck.why,
        },
        "members": list(plan.matrix.members),
        "matrix": [
            {
                "device": line.devices[0],
                "deviceClass": line.device_class,
                "instances": line.row,
                "usedBytes": line.used_bytes,
                "freeBytes": line.free_bytes,
                "utilisation": line.utilisation,
                "bottleneck": line.is_bottleneck,
            }
            for line in lines_of(problem, plan, collapse=False)
        ],
    }
    if plan.measured_rows_per_s is not None:
        document["measuredRowsPerS"] = plan.measured_rows_per_s
    if plan.device_bound:
        document |= {"deviceBound": plan.device_bound, "shortfallRowsPerS": plan.shortfall_rows_per_s}
    if explain:
        uses = plan.explanation.instances
        document["explanation"] = {
            "tried": list(plan.explanation.tried),
            "noMore": list(bottleneck.no_more),
            "unused": {use.device: use.why_unused for use in plan.explanation.devices if use.why_unused},
            "instances": [
                {
                    "device": use.device,
                    "member": use.member,
                    "batchSize": use.batch_size,
                    "rowsPerS": use.rows_per_s,
                    "aloneRowsPerS": use.alone_rows_per_s,
                    "deviceTime": use.device_time,
                    "why": use.why,
                }
                for use in uses
            ],
        }
    return document


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _COLUMN_GAP * (len(widths) - 1)


def _empty() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _label(line: Line) -> Text:
    if line.is_bottleneck:
        return Text(f"{line.label} {BOTTLENECK_MARK}", style="bold")
    return Text(line.label, style="" if line.row else "dim")


def _cell(line: Line, member: str) -> str:
    return str(line.row[member]) if member in line.row else _NOTHING


def _upright(lines: Sequence[Line], members: Sequence[str]) -> Table:
    table = _empty()
    table.add_column("device", no_wrap=True)
    for column in (*members, *_FIGURES):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(_label(line), *(_cell(line, member) for member in members), *line.figures)
    return table


def _sideways(lines: Sequence[Line], members: Sequence[str]) -> Table:
    table = _empty()
    table.add_column("member", no_wrap=True)
    for line in lines:
        table.add_column(_label(line), justify="right", no_wrap=True)
    for index, member in enumerate(members):
        table.add_row(member, *(_cell(line, member) for line in lines), end_section=index == len(members) - 1)
    for name, figures in zip(_FIGURES, zip(*(line.figures for line in lines), strict=True), strict=True):
        table.add_row(name, *figures)
    return table


def _listing(lines: Sequence[Line]) -> Table:
    table = _empty()
    table.add_column("device", no_wrap=True)
    table.add_column("members", overflow="fold")
    for column in _FIGURES:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(_label(line), placed(line.row), *line.figures)
    return table


def _rate(rows_per_s: float) -> str:
    return f"{rows_per_s:,.0f}" if rows_per_s >= 1000 else f"{rows_per_s:,.1f}"
