"""An operator's counters, what it used between two readings of them, and a run's figures as a table. Pure."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator

import msgspec

MIB = 1 << 20
# What the operator may take, its planning process included.
MAX_MEMORY_BYTES = 300 * MIB
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Reading(msgspec.Struct, frozen=True, rename="camel"):
    """The operator's counters at one moment, `at_s` on a monotonic clock.

    `requests` to the API server are by verb and resource (a watch is one); `refused` are those that failed, by code.
    """

    at_s: float
    cpu_s: float
    reconciles: int
    failed: int
    requests: dict[str, int]
    refused: dict[str, int]


class Cost(msgspec.Struct, frozen=True, rename="camel"):
    """What the operator used between two readings."""

    seconds: float
    cpu_s: float
    reconciles: int
    failed: int
    requests: dict[str, int]
    refused: dict[str, int]

    @property
    def total(self) -> int:
        """Requests to the API server."""
        return sum(self.requests.values())

    @property
    def by_verb(self) -> dict[str, int]:
        """Requests to the API server by verb, most first."""
        found: Counter[str] = Counter()
        for name, count in self.requests.items():
            found[name.split()[0]] += count
        return dict(found.most_common())

    @staticmethod
    def between(first: Reading, last: Reading) -> Cost:
        """The difference of two readings."""
        return Cost(
            last.at_s - first.at_s,
            last.cpu_s - first.cpu_s,
            last.reconciles - first.reconciles,
            last.failed - first.failed,
            dict(Counter(last.requests) - Counter(first.requests)),
            dict(Counter(last.refused) - Counter(first.refused)),
        )


class Result(msgspec.Struct, frozen=True, rename="camel"):
    """One run. `ready_s` is when each ensemble was Ready, in seconds since the first was applied.

    `planning_cpu_s` is the CPU of the planning process; the peaks are of resident memory, without and with it.
    `fleet_requests` are those to the admin APIs, until the end of the idle time.
    """

    ensembles: int
    members: int
    devices: int
    applied_s: float
    ready_s: tuple[float, ...]
    start: Cost
    idle: Cost
    planning_cpu_s: float
    peak_bytes: int
    peak_with_planning_bytes: int
    idle_bytes: int
    fleet_requests: dict[str, int]

    @property
    def is_within_memory(self) -> bool:
        """Whether the operator stayed under its limit."""
        return self.peak_with_planning_bytes < MAX_MEMORY_BYTES


def read_page(page: str, at_s: float) -> Reading:
    """The counters on the operator's page of metrics."""
    requests: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    results: Counter[str] = Counter()
    cpu_s = 0.0
    for name, inside, value in _SAMPLE.findall(page):
        labels = dict(_LABEL.findall(inside))
        if name == "ensemble_operator_api_requests_total":
            requests[f"{labels['verb']} {labels['resource']}"] += int(value)
            if not 200 <= int(labels["code"]) < 300:
                refused[f"{labels['verb']} {labels['resource']} {labels['code']}"] += int(value)
        elif name == "ensemble_operator_reconciles_total":
            results[labels["result"]] += int(value)
        elif name == "process_cpu_seconds_total":
            cpu_s = float(value)
    return Reading(at_s, cpu_s, results.total(), results["failed"], dict(requests), dict(refused))


def table(result: Result) -> str:
    """A run's figures for a person."""
    return "\n".join(f"{name:<34}{value}" for name, value in _rows(result))


def _rows(result: Result) -> Iterator[tuple[str, str]]:
    start, idle, ready = result.start, result.idle, result.ready_s
    yield "ensembles x members, devices each", f"{result.ensembles} x {result.members}, {result.devices}"
    yield "all applied after", f"{result.applied_s:.1f} s"
    median_s = statistics.median(ready)
    yield "Ready: first, median, last", f"{ready[0]:.1f} s, {median_s:.1f} s, {ready[-1]:.1f} s"
    limit = "" if result.is_within_memory else f"  OVER THE LIMIT OF {MAX_MEMORY_BYTES // MIB} MiB"
    together = result.peak_with_planning_bytes
    yield "resident memory, at most", f"{result.peak_bytes / MIB:.0f} MiB"
    yield "  with the planning process", f"{together / MIB:.0f} MiB{limit}"
    yield "  idle", f"{result.idle_bytes / MIB:.0f} MiB"
    yield "CPU until all were Ready", f"{start.cpu_s:.1f} s, and {result.planning_cpu_s:.1f} s of the planning process"
    yield "  an ensemble", f"{1e3 * start.cpu_s / result.ensembles:.0f} ms"
    yield "reconciles, of them failed", f"{start.reconciles}, {start.failed}"
    each = start.total / result.ensembles
    yield "API requests until then", f"{start.total} ({each:.1f} an ensemble)"
    yield "  by verb", _listed(start.by_verb)
    yield "  by verb and resource", _listed(dict(Counter(start.requests).most_common()))
    yield "  refused", _listed(start.refused)
    yield f"idle for {idle.seconds:.0f} s: API requests/s", f"{idle.total / idle.seconds:.2f}"
    yield "  by verb and resource", _listed(dict(Counter(idle.requests).most_common()))
    yield "  CPU", f"{100 * idle.cpu_s / idle.seconds:.2f} % of one core"
    yield "  reconciles", f"{idle.reconciles}"
    yield "admin API requests, in all", _listed(result.fleet_requests)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
