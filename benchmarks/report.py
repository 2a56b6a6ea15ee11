"""Windows to figures: medians, shares of the raw bound, verdicts and the table. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec

from benchmarks.loadgen import WindowResult
from benchmarks.loads import Load, Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# One system is ahead of another if it is in at least this share of the interleaved windows; else they tie.
AHEAD_SHARE = 0.8
BUSY_LOAD_SHARE = 0.9


class Measured(msgspec.Struct, frozen=True):
    """The windows of one system under one load; `setting` is what was chosen for it.

    `cpu_s`: CPU that the server took in all windows, by its processes' part in it; empty where it was not looked at.
    """

    system: str
    windows: tuple[WindowResult, ...]
    setting: str = ""
    target: Target = Target()
    cpu_s: dict[str, float] = {}

    @property
    def rows_per_s(self) -> float:
        """The median rate."""
        return statistics.median(w.rows_per_s for w in self.windows)

    @property
    def mistakes(self) -> int:
        """Failed requests and wrong answers of all windows."""
        return sum(w.failures + w.wrong for w in self.windows)


class Cell(msgspec.Struct, frozen=True):
    """One workload under one load: the raw bounds' windows by setting, every system's in the order of time.

    `raw` is of members as our workers execute them, `raw_plain` of members as PyTorch loads them.
    """

    workload: str
    load: Load
    raw: dict[str, tuple[float, ...]]
    raw_plain: dict[str, tuple[float, ...]]
    systems: tuple[Measured, ...]

    def share(self, measured: Measured) -> float:
        """A system's share of the raw bound."""
        return measured.rows_per_s / bound(self.raw)[1]

    def plain_share(self, measured: Measured) -> float:
        """A system's share of the raw bound of plain members."""
        return measured.rows_per_s / bound(self.raw_plain)[1]


class Report(msgspec.Struct, frozen=True):
    """What `--json` writes. Memory is each server's, in bytes (PSS), when its windows were over."""

    machine: dict[str, str]
    window_s: float
    windows: int
    cells: tuple[Cell, ...]
    memory_bytes: dict[str, dict[str, int]]


def bound(windows: Mapping[str, Sequence[float]]) -> tuple[str, float]:
    """A raw bound: the setting with the highest median of its rates, and that."""
    medians = {setting: statistics.median(rates) for setting, rates in windows.items()}
    best = max(medians, key=medians.__getitem__)
    return best, medians[best]


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Who had the higher rate, window by window as they were interleaved: "ahead", "behind" or "tie"."""
    pairs = list(zip(ours, theirs, strict=True))
    if sum(a > b for a, b in pairs) >= AHEAD_SHARE * len(pairs):
        return "ahead"
    if sum(a < b for a, b in pairs) >= AHEAD_SHARE * len(pairs):
        return "behind"
    return "tie"


def judge(cell: Cell, measured: Measured) -> list[str]:
    """What was promised for this system here, and whether it is met; what makes the figures doubtful."""
    said = []
    share, target = cell.plain_share(measured), measured.target
    if target.share_of_plain:
        said.append(f"target {target.share_of_plain:.2f} {'met' if share >= target.share_of_plain else 'MISSED'}")
    if target.triton_share:
        said.append(f"Triton's {target.triton_share:.2f} {'passed' if share > target.triton_share else 'NOT PASSED'}")
    if measured.system == "ours":
        rates = [w.rows_per_s for w in measured.windows]
        peers = (peer for peer in cell.systems if peer.system.startswith("mosec"))
        said += [f"{peer.system}: {verdict(rates, [w.rows_per_s for w in peer.windows])}" for peer in peers]
    if measured.mistakes:
        cause = next((w.error for w in measured.windows if w.error), "wrong values")
        said.append(f"{measured.mistakes} FAILED OR WRONG: {cause}")
    if statistics.median(w.cpu_share for w in measured.windows) > BUSY_LOAD_SHARE:
        said.append("the load generator is what limits")
    return said


def table(cells: Sequence[Cell]) -> str:
    """All cells as a Markdown table."""
    lines = [
        "| workload | load | system | rows/s | p50 ms | p99 ms | of raw | of plain raw | of mosec | load CPU | notes |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for cell in cells:
        (setting, rate), (plain_setting, plain) = bound(cell.raw), bound(cell.raw_plain)
        where = f"{cell.workload} | {cell.load.name}"
        lines.append(f"| {where} | raw | {rate:,.0f} | | | 1.00 | {rate / plain:.2f} | | | {setting} |")
        lines.append(f"| | | plain raw | {plain:,.0f} | | | {plain / rate:.2f} | 1.00 | | | {plain_setting} |")
        mosec = next((m for m in cell.systems if m.system == "mosec"), None)
        lines += [_line(cell, measured, mosec) for measured in cell.systems]
    return "\n".join(lines)


def unmet(cells: Sequence[Cell]) -> list[str]:
    """Every promise that was not met, and every mistake, a line each."""
    marks = ("MISSED", "NOT PASSED", "FAILED", ": behind")
    return [
        f"{cell.workload}, {cell.load.name}, {measured.system}: {text}"
        for cell in cells
        for measured in cell.systems
        for text in judge(cell, measured)
        if any(mark in text for mark in marks)
    ]


def _cpu(measured: Measured) -> str:
    """What a request costs each part of the server; those outside the count, which it has served too, included."""
    requests = sum(window.checked for window in measured.windows)
    if not measured.cpu_s or not requests:
        return ""
    parts = (f"{part} {1e6 * seconds / requests:,.0f}" for part, seconds in sorted(measured.cpu_s.items()))
    return f"CPU us a request: {', '.join(parts)}"


def _line(cell: Cell, measured: Measured, mosec: Measured | None) -> str:
    p50 = statistics.median(w.p50_ms for w in measured.windows)
    p99 = statistics.median(w.p99_ms for w in measured.windows)
    cpu = statistics.median(w.cpu_share for w in measured.windows)
    of_mosec = (
        f"{measured.rows_per_s / mosec.rows_per_s:.2f}" if mosec and mosec.rows_per_s and mosec is not measured else ""
    )
    notes = "; ".join(filter(None, [measured.setting, *judge(cell, measured), _cpu(measured)]))
    return (
        f"| | | {measured.system} | {measured.rows_per_s:,.0f} | {p50:.2f} | {p99:.2f} | {cell.share(measured):.2f} "
        f"| {cell.plain_share(measured):.2f} | {of_mosec} | {cpu:.0%} | {notes} |"
    )
