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
    """What was answered between two looks: rows/s, and the mean time of a request (None without one)."""

    rows_per_s: float = 0.0
    mean_latency_s: float | None = None


def rates(before: GatewayState | None, now: GatewayState | None, elapsed_s: float) -> Rates:
    """The rates between two looks at the gateway; none where it was away, or counts anew."""
    if before is None or now is None or elapsed_s <= 0 or now.rows < before.rows or now.requests < before.requests:
        return Rates()
    requests = now.requests - before.requests
    latency_s = (now.request_seconds - before.request_seconds) / requests if requests else None
    return Rates((now.rows - before.rows) / elapsed_s, latency_s)


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
