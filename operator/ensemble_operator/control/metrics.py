"""The operator's metrics in Prometheus' text format. Pure: figures that others own are read when somebody asks.

Names and labels are a promise to dashboards and alerts: `NAMES` lists all of them.
"""

from __future__ import annotations

import resource
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ensemble_operator.control.kinds import Manifest

_DURATIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_P = "ensemble_operator"
NAMES: Mapping[str, tuple[str, str]] = {
    f"{_P}_reconciles_total": ("counter", "Reconciles by result: done, failed, cancelled."),
    f"{_P}_reconcile_duration_seconds": ("histogram", "How long reconciles take."),
    f"{_P}_reconcile_failures_total": ("counter", "Reconciles that raised, by reason."),
    f"{_P}_api_requests_total": ("counter", "Requests to the API server by verb, resource and code (0: no answer)."),
    f"{_P}_watch_lists_total": ("counter", "Times that a kind was listed anew for its watch."),
    f"{_P}_ensembles": ("gauge", "InferenceEnsembles by phase."),
    f"{_P}_devices": (
        "gauge",
        "Devices by state: wanted by ensembles, held by them, free on the nodes when last seen.",
    ),
    f"{_P}_queue_depth": ("gauge", "Ensembles that wait for a reconcile."),
    f"{_P}_queue_oldest_seconds": ("gauge", "For how long the first of them has waited."),
    f"{_P}_leader": ("gauge", "1 if this process leads."),
    "process_cpu_seconds_total": ("counter", "CPU time of this process."),
    "process_resident_memory_bytes": ("gauge", "Memory of this process."),
    "process_start_time_seconds": ("gauge", "When this process began, in seconds of Unix time."),
}


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom to ask at a scrape."""

    requests: Callable[[], Mapping[tuple[str, str, int], int]]
    relists: Callable[[], Mapping[str, int]]
    ensembles: Callable[[], Iterable[Manifest]]
    queue_depth: Callable[[], int]
    queue_oldest_s: Callable[[], float]
    leads: Callable[[], bool]


class Instruments:
    """Counts what the operator itself does."""

    def __init__(self, started: float | None = None) -> None:
        self._started = time.time() if started is None else started
        self._results: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._buckets = [0] * (len(_DURATIONS_S) + 1)
        self._duration_sum_s = 0.0
        self._free_devices: int | None = None

    def reconciled(self, result: str, duration_s: float, reason: str = "") -> None:
        """A reconcile ended: done, failed (with a reason) or cancelled."""
        self._results[result] += 1
        if reason:
            self._failures[reason] += 1
        self._buckets[bisect_left(_DURATIONS_S, duration_s)] += 1
        self._duration_sum_s += duration_s

    def free_devices(self, count: int | None) -> None:
        """Devices that were free on the nodes when last looked at; None: not known."""
        self._free_devices = count

    def exposition(self, sources: Sources) -> str:
        """The page that a scrape gets."""
        page = _Page()
        page.add(f"{_P}_reconciles_total", {("result", result): n for result, n in self._results.items()})
        self._durations(page)
        page.add(f"{_P}_reconcile_failures_total", {("reason", reason): n for reason, n in self._failures.items()})
        page.head(f"{_P}_api_requests_total")
        for (verb, of, code), count in sorted(sources.requests().items()):
            page.line(f"{_P}_api_requests_total", {"verb": verb, "resource": of, "code": str(code)}, count)
        page.add(f"{_P}_watch_lists_total", {("resource", of): n for of, n in sources.relists().items()})
        self._resources(page, sources.ensembles())
        page.add(f"{_P}_queue_depth", {None: sources.queue_depth()})
        page.add(f"{_P}_queue_oldest_seconds", {None: sources.queue_oldest_s()})
        page.add(f"{_P}_leader", {None: int(sources.leads())})
        page.add("process_cpu_seconds_total", {None: time.process_time()})
        page.add("process_resident_memory_bytes", {None: _resident_bytes()})
        page.add("process_start_time_seconds", {None: self._started})
        return page.text()

    def _durations(self, page: _Page) -> None:
        name, below = f"{_P}_reconcile_duration_seconds", 0
        page.head(name)
        for bound, count in zip((*map(str, _DURATIONS_S), "+Inf"), self._buckets, strict=True):
            below += count
            page.line(f"{name}_bucket", {"le": bound}, below)
        page.line(f"{name}_sum", {}, self._duration_sum_s)
        page.line(f"{name}_count", {}, below)

    def _resources(self, page: _Page, ensembles: Iterable[Manifest]) -> None:
        phases: Counter[str] = Counter()
        devices: Counter[str] = Counter({"wanted": 0, "held": 0})
        for ensemble in ensembles:
            status = ensemble.get("status") or {}
            phases[str(status.get("phase") or "Unknown")] += 1
            for state in ("wanted", "held"):
                devices[state] += int((status.get("devices") or {}).get(state) or 0)
        if self._free_devices is not None:
            devices["free"] = self._free_devices
        page.add(f"{_P}_ensembles", {("phase", phase): n for phase, n in phases.items()})
        page.add(f"{_P}_devices", {("state", state): n for state, n in devices.items()})


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def head(self, name: str) -> None:
        kind, explanation = NAMES[name]
        self._lines += [f"# HELP {name} {explanation}", f"# TYPE {name} {kind}"]

    def line(self, name: str, labels: Mapping[str, str], value: float) -> None:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        self._lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")

    def add(self, name: str, values: Mapping[tuple[str, str] | None, float]) -> None:
        self.head(name)
        for label, value in sorted(values.items(), key=str):
            self.line(name, {} if label is None else {label[0]: label[1]}, value)

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # a file of the kernel
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
