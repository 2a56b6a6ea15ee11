"""The tables that `ensemble` shows: the allocation matrix, and the live view of what serves. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.profiles.measurements import Device

MIB = 1 << 20
# A wider matrix does not fit on a terminal: each device's members are listed instead.
MAX_MEMBER_COLUMNS = 8
STATE_STYLES = {"ready": "green", "failed": "red", "given up": "red", "restarting": "yellow"}


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device, its worker's state, and what the worker does now. `in_flight` counts batches."""

    name: str
    state: str
    instances: str
    in_flight: int
    restarts: int


@dataclass(frozen=True, slots=True)
class LiveView:
    """What is shown while an ensemble serves."""

    url: str
    rows_per_s: float
    p50_s: float | None
    p99_s: float | None
    requests: int
    failures: int
    store_bytes: int
    gateway_restarts: int
    members: Mapping[str, bool]
    devices: tuple[DeviceView, ...]


def allocation_table(
    matrix: Matrix, used_bytes: Mapping[str, float], capacity_bytes: Mapping[str, int], unplaced: Sequence[str]
) -> Table:
    """The matrix: a row a device, batch sizes in its cells, and the memory its instances and overheads take."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="allocation matrix (batch sizes)", title_justify="left")
    table.add_column("device", no_wrap=True)
    wide = len(matrix.members) > MAX_MEMBER_COLUMNS
    for name in ("members",) if wide else matrix.members:
        table.add_column(name, justify="left" if wide else "right", overflow="fold")
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for index, device in enumerate(matrix.devices):
        row = matrix.row(index)
        cells = [placed(row)] if wide else [str(row[m]) if m in row else "·" for m in matrix.members]
        table.add_row(device, *cells, f"{used_bytes[device] / MIB:,.0f}", f"{capacity_bytes[device] / MIB:,.0f}")
    if unplaced:
        table.caption = f"not placed: {', '.join(unplaced)}"
        table.caption_justify = "left"
    return table


def devices_table(devices: Sequence[Device]) -> Table:
    """This machine's devices."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("device", "kind", "class", "cores"):
        table.add_column(column, no_wrap=True)
    table.add_column("MiB", justify="right")
    for device in devices:
        cores = ",".join(map(str, device.cores)) or "-"
        table.add_row(device.name, device.kind, device.device_class, cores, f"{device.capacity_bytes / MIB:,.0f}")
    return table


def placed(row: Mapping[str, int]) -> str:
    """A device's instances in a line: `lite0 x32, lite1 x8`."""
    return ", ".join(f"{member} x{batch_size}" for member, batch_size in row.items()) or "-"


def live_table(view: LiveView) -> Table:
    """The live view: figures in the title, a row a device, members that do not answer in the caption."""
    restarts = f" · gateway restarted {view.gateway_restarts}x" if view.gateway_restarts else ""
    title = (
        f"{view.url} · {view.rows_per_s:,.0f} rows/s{_latency(view)} · {view.requests:,} requests, "
        f"{view.failures:,} failed · {view.store_bytes / MIB:,.1f} MiB in store{restarts}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("device", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("instances", overflow="ellipsis", no_wrap=True)
    table.add_column("batches in flight", justify="right")
    table.add_column("restarts", justify="right")
    for device in view.devices:
        state = Text(device.state, style=STATE_STYLES.get(device.state, ""))
        table.add_row(device.name, state, device.instances, str(device.in_flight), str(device.restarts))
    missing = [name for name, live in view.members.items() if not live]
    if missing:
        table.caption = f"not answering: {', '.join(missing)}"
        table.caption_style = "red"
        table.caption_justify = "left"
    return table


def one_line(view: LiveView) -> str:
    """The live view as a log line."""
    missing = [name for name, live in view.members.items() if not live]
    tail = f"; not answering: {', '.join(missing)}" if missing else ""
    return (
        f"{view.rows_per_s:,.0f} rows/s{_latency(view)}, {view.requests:,} requests, {view.failures:,} failed, "
        f"{view.store_bytes / MIB:,.1f} MiB in store{tail}"
    )


def _latency(view: LiveView) -> str:
    if view.p50_s is None or view.p99_s is None:
        return ""
    return f" at {view.p50_s * 1000:,.1f} ms (p50), {view.p99_s * 1000:,.1f} ms (p99)"
