"""One look at gateway and workers, and what follows from it: which members answer, which never will. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble_operator.fleet import GatewayState, WorkerReport


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen: None for a process that does not answer. `given_up` has why a worker is not started again."""

    gateway: GatewayState | None
    workers: Mapping[str, WorkerReport | None]
    given_up: Mapping[str, str]

    @property
    def newest_generation(self) -> int:
        """The highest generation of a plan that anybody has."""
        reports = (report.generation for report in self.workers.values() if report is not None)
        return max((self.gateway.newest if self.gateway else 0), *reports, 0)


@dataclass(frozen=True, slots=True)
class Progress:
    """`failed` has the reason of each member that cannot come to answer; `pending` are those still awaited."""

    failed: Mapping[str, str]
    pending: tuple[str, ...]
    live: tuple[str, ...]

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be awaited."""
        return not self.pending


def progress(
    members: Sequence[str], placed: Mapping[str, Sequence[str]], unloadable: Mapping[str, str], observed: Observed
) -> Progress:
    """How far the start has come.

    `placed` has the workers of each member, `unloadable` the members that were not placed and why. A member is live
    when the gateway says so. It has failed when each of its workers says so or is given up.
    """
    gateway = observed.gateway
    answering = {m.name for m in gateway.members if m.live} if gateway else set()
    failed = dict(unloadable)
    for member in members:
        reasons = [_failure(member, worker, observed) for worker in placed.get(member, ())]
        if member not in answering and reasons and all(reasons):
            failed[member] = next(filter(None, reasons))
    live = tuple(member for member in members if member in answering)
    pending = tuple(member for member in members if member not in answering and member not in failed)
    return Progress(failed, pending, live)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was answered between two looks: rows/s, and the median and 99th percentile of the times (None without)."""

    rows_per_s: float = 0.0
    p50_s: float | None = None
    p99_s: float | None = None


def rates(before: GatewayState | None, now: GatewayState | None, elapsed_s: float) -> Rates:
    """The rates between two looks at the gateway; none where it was away, or counts anew."""
    if before is None or now is None or elapsed_s <= 0 or now.rows < before.rows or now.requests < before.requests:
        return Rates()
    earlier = before.duration_counts or (0,) * len(now.duration_counts)
    counts = [count - then for count, then in zip(now.duration_counts, earlier, strict=True)]
    bounds = now.duration_bounds_s
    return Rates((now.rows - before.rows) / elapsed_s, quantile(bounds, counts, 0.5), quantile(bounds, counts, 0.99))


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that this share of the counted ones does not exceed, even in its bucket; None if none were counted.

    `counts` has the values up to each bound, and last those above all, which are taken for the highest bound.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count >= wanted:
            return lower + (bound - lower) * wanted / count
        wanted -= count
        lower = bound
    return lower


def worker_state(report: WorkerReport | None, *, running: bool, given_up: bool) -> str:
    """A worker's state in one word for people."""
    if given_up:
        return "given up"
    if not running:
        return "restarting"
    if report is None:
        return "starting"
    states = [instance.state for instance in report.instances]
    for state in ("fetching", "loading", "failed"):
        if state in states:
            return state
    return "ready" if states else "idle"


def _failure(member: str, worker: str, observed: Observed) -> str:
    """Why the member cannot answer on this worker; empty while it may."""
    if worker in observed.given_up:
        return observed.given_up[worker]
    report = observed.workers.get(worker)
    for instance in report.instances if report else ():
        if instance.member == member and instance.state == "failed":
            return instance.error or f"failed on {worker} without a reason"
    return ""
