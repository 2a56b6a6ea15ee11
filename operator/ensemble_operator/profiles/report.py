"""Profiles for people and for programs. The document is a described cluster, which `ensemble plan` reads. Pure."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ensemble_operator.allocation.errors import MIB, InvalidProblem
from ensemble_operator.planning.cluster_file import FAILURES, device_entries, overheads, profile_entries
from ensemble_operator.profiles.held import serving_problem
from ensemble_operator.profiles.profiling import Profiled
from ensemble_operator.profiles.serving_cost import ServingCost

# Windows of one layout that differ by more were measured on a machine that did other things besides.
LARGE_SPREAD = 0.25


def profile_table(profiled: Profiled) -> Table:
    """A line for every member, class and batch size; the fastest batch size of each member is bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("member", "device class"):
        table.add_column(column, no_wrap=True)
    for column in ("batch", "rows/s", "ms a batch", "spread", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for (member, device_class), found in profiled.measured.items():
        best = max((p.rows_per_s for p in found.points), default=0.0)
        for point in found.points:
            figures = (
                f"{point.rows_per_s:,.1f}",
                f"{point.latency_s * 1e3:,.2f}",
                f"{point.spread:.0%}",
                f"{point.memory_bytes / MIB:,.1f}",
            )
            style = "bold" if point.rows_per_s == best else ""
            table.add_row(member, device_class, *(Text(t, style) for t in (str(point.batch_size), *figures)))
        if not found.points:
            table.add_row(member, device_class, *("-" * 5))
    return table


def remarks(profiled: Profiled, cost: ServingCost | None = None) -> list[str]:
    """What could not be measured, what devices do besides running members, and how long it took."""
    lines = [f"{m} on {c}: {found.error}" for (m, c), found in profiled.measured.items() if found.error]
    lines += [
        f"members that share a device of {device_class} get {factor:.2f} devices' time together"
        for device_class, factor in profiled.colocation.items()
    ]
    if cost is not None:
        figures = f"{cost.batch_s * 1e6:,.0f} us a batch and {cost.row_s * 1e6:,.1f} us a row"
        lines.append(f"serving takes {figures} of each member's device besides, which plans reckon with")
        if cost.spread > LARGE_SPREAD:
            lines.append(
                f"that was measured in windows that differ by {cost.spread:.0%}: on a machine that does nothing else, "
                "--force measures it again"
            )
    kept = "all known already" if not profiled.runs else f"{profiled.runs} measured anew"
    return [*lines, f"{len(profiled.measured)} profiles ({kept}) in {profiled.seconds:.1f} s"]


def profile_document(profiled: Profiled) -> dict[str, Any]:
    """A described cluster of this machine's devices and the members that could be measured; the others as failures."""
    ensemble, devices = profiled.ensemble, profiled.devices
    able = dict.fromkeys(member for (member, _), found in profiled.measured.items() if found.points)
    sizes = {point.batch_size for found in profiled.measured.values() for point in found.points}
    classes = ", ".join(dict.fromkeys(d.device_class for d in devices))
    document: dict[str, Any] = {
        "name": ensemble.name,
        "source": f"measured by ensemble profile on {classes}",
        "batchSizes": sorted(sizes),
        "headroom": ensemble.spec.devices.memory_headroom,
        "devices": [
            entry
            | ({"colocation": profiled.colocation[entry["class"]]} if entry["class"] in profiled.colocation else {})
            for entry in device_entries(devices, _overheads(profiled))
        ],
        "members": [{"name": name} for name in able],
        "profiles": profile_entries(profiled.measured),
    }
    if failed := [
        {"member": member, "deviceClass": device_class, "error": found.error}
        for (member, device_class), found in profiled.measured.items()
        if found.error
    ]:
        document[FAILURES] = failed
    return document


def _overheads(profiled: Profiled) -> dict[str, int]:
    ensemble, devices = profiled.ensemble, profiled.devices
    try:
        return overheads(serving_problem(ensemble, devices, profiled.measured))
    except InvalidProblem:
        return {}  # nothing could be measured on some class: the usual overhead stands for it
