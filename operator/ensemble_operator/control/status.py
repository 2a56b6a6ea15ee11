"""From what was found to the resource's status, and from two statuses to the events between them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.api.status import MAX_INSTANCES, MAX_ROWS
from ensemble_operator.control import conditions as c
from ensemble_operator.control.conditions import Condition, Conditions
from ensemble_operator.control.target import Target
from ensemble_operator.control.times import rfc3339

Manifest = Mapping[str, Any]
NORMAL, WARNING = "Normal", "Warning"
ACQUIRE_TIMEOUT, NO_DEVICE_VISIBLE, PODS_NOT_CREATED = "AcquireTimeout", "NoDeviceVisible", "PodsNotCreated"
SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A row of the allocation matrix, for people."""

    worker: str
    node: str
    device_class: str
    used_bytes: int
    capacity_bytes: int
    instances: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that a status tells besides its conditions.

    `replicas`, `held`, `live` are None where nothing was looked at this time: then what was told before still counts.
    """

    replicas: int | None
    selector: str
    wanted: int
    held: int | None = None
    plan: EnsemblePlan | None = None
    target: Target | None = None
    rows: tuple[WorkerRow, ...] = ()
    measured_rows_per_s: float | None = None
    members: int = 0
    live: int | None = None
    url: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """An event that a person would want."""

    type: str
    reason: str
    message: str
    action: str


def conditions_of(status: Manifest) -> dict[str, Condition]:
    """The conditions of a status."""
    return {
        found["type"]: Condition(found["status"], found.get("reason", ""), found.get("message", ""))
        for found in status.get("conditions") or ()
    }


def make_status(before: Manifest, found: Conditions, facts: Facts, generation: int, now: float) -> dict[str, Any]:
    """The status to report; times of transitions are those of `before` where nothing has changed."""
    times = {old["type"]: (old["status"], old["lastTransitionTime"]) for old in before.get("conditions") or ()}
    seen = {old["type"]: old.get("observedGeneration", 0) for old in before.get("conditions") or ()}
    listed = []
    said = dict(found.complete(conditions_of(before)))
    for type_, condition in said.items():
        was, since = times.get(type_, ("", ""))
        listed.append(
            {
                "type": type_,
                "status": condition.status,
                "observedGeneration": generation if type_ in found.said else seen.get(type_, generation),
                "lastTransitionTime": since if was == condition.status else rfc3339(now),
                "reason": condition.reason,
                "message": condition.message,
            }
        )
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": listed,
        "phase": phase_of(said),
        "replicas": before.get("replicas", 0) if facts.replicas is None else facts.replicas,
        "selector": facts.selector,
    }
    _add_devices(status, before, facts)
    _add_members(status, before, facts)
    if facts.plan is not None:
        status["allocation"] = _allocation(facts.plan, facts.rows)
    if facts.target is not None:
        status["throughput"] = _throughput(facts, before)
    if facts.url:
        status["url"] = facts.url
    if facts.replicas is None:
        status |= {part: before[part] for part in ("allocation", "throughput", "url") if part in before}
    return status


def phase_of(said: Mapping[str, Condition]) -> str:
    """The conditions in one word."""
    if said[c.ACCEPTED].status == c.FALSE:
        return "Rejected"
    if said[c.READY].status == c.TRUE:
        return "Degraded" if said[c.DEGRADED].status == c.TRUE else "Ready"
    if said[c.DEGRADED].status == c.TRUE:
        return "Degraded"
    for type_, phase in ((c.PLANNED, "Starting"), (c.PROFILED, "Planning"), (c.DEVICES_ACQUIRED, "Profiling")):
        if said[type_].status == c.TRUE:
            return phase
    return "Released" if said[c.DEVICES_ACQUIRED].reason == ACQUIRE_TIMEOUT else "Acquiring"


def same_but_times(one: Manifest, other: Manifest) -> bool:
    """Whether two statuses say the same."""
    return _without_times(one) == _without_times(other)


def events(before: Manifest, after: Manifest) -> Iterator[Event]:
    """What happened between two statuses. Nothing that merely lasts is an event."""
    old, new = conditions_of(before), conditions_of(after)
    for type_, reason, action in (
        (c.DEVICES_ACQUIRED, "DevicesAcquired", "Acquire"),
        (c.READY, "Ready", "Report"),
        (c.DEGRADED, "Degraded", "Report"),
        (c.ROLLOUT_BLOCKED, "RolloutBlocked", "Push"),
    ):
        now, then = new[type_], old.get(type_)
        if now.status == c.TRUE and (then is None or then.status != c.TRUE or _worse(type_, then, now)):
            yield Event(WARNING if type_ in c.ABNORMAL else NORMAL, reason, now.message, action)
    for type_, action in ((c.ACCEPTED, "Accept"), (c.PROFILED, "Profile"), (c.PLANNED, "Plan")):
        now, then = new[type_], old.get(type_)
        bad = now.status == c.FALSE and now.reason not in ("Measuring", "Waiting")
        if bad and (then is None or (then.status, then.reason) != (now.status, now.reason)):
            yield Event(WARNING, now.reason, now.message, action)
    lost = old.get(c.READY)
    if lost is not None and lost.status == c.TRUE and new[c.READY].status == c.FALSE:
        yield Event(WARNING, "NotReady", new[c.READY].message, "Report")
    now, then = new[c.DEVICES_ACQUIRED], old.get(c.DEVICES_ACQUIRED)
    alarming = now.status == c.FALSE and now.reason in (ACQUIRE_TIMEOUT, NO_DEVICE_VISIBLE, PODS_NOT_CREATED)
    if alarming and (then is None or then.reason != now.reason):
        yield Event(WARNING, now.reason, now.message, "Acquire")


def plan_changed(before: Target | None, after: Target) -> Event:
    """The event of another matrix."""
    instances = sum(map(len, after.rows.values()))
    devices = sum(1 for row in after.rows.values() if row)
    now = f"{after.predicted_rows_per_s:.6g} rows/s predicted ({instances} instances on {devices} devices)"
    old = f", was {before.predicted_rows_per_s:.6g} rows/s" if before is not None else ""
    return Event(NORMAL, "PlanChanged", f"{now}{old}; {after.why}", "Plan")


def _worse(type_: str, then: Condition, now: Condition) -> bool:
    return type_ in c.ABNORMAL and then.reason != now.reason


def _add_devices(status: dict[str, Any], before: Manifest, facts: Facts) -> None:
    held = facts.held if facts.held is not None else (before.get("devices") or {}).get("held", 0)
    status["devices"] = {"wanted": facts.wanted, "held": held, "summary": f"{held}/{facts.wanted}"}


def _add_members(status: dict[str, Any], before: Manifest, facts: Facts) -> None:
    live = facts.live if facts.live is not None else (before.get("members") or {}).get("live", 0)
    live = min(live, facts.members)
    status["members"] = {"total": facts.members, "live": live, "summary": f"{live}/{facts.members}"}


def _allocation(plan: EnsemblePlan, rows: Sequence[WorkerRow]) -> dict[str, Any]:
    return {
        "generation": plan.generation,
        "instances": sum(map(len, plan.rows.values())),
        "omittedRows": max(0, len(rows) - MAX_ROWS),
        "rows": [
            {
                "worker": row.worker,
                "node": row.node,
                "deviceClass": row.device_class[:253],
                "usedBytes": row.used_bytes,
                "capacityBytes": row.capacity_bytes,
                "instances": [{"member": m, "batchSize": size} for m, size in row.instances[:MAX_INSTANCES]],
            }
            for row in rows[:MAX_ROWS]
        ],
    }


def _throughput(facts: Facts, before: Manifest) -> dict[str, float]:
    target = facts.target
    assert target is not None  # noqa: S101  the caller looked
    found = {"predicted": _rounded(target.predicted_rows_per_s), "bound": _rounded(target.bound_rows_per_s)}
    measured = facts.measured_rows_per_s
    if measured is None:
        measured = (before.get("throughput") or {}).get("measured")
    return found if measured is None else {**found, "measured": _rounded(measured)}


def _rounded(rate: float) -> float:
    return float(f"{rate:.{SIGNIFICANT_DIGITS}g}")


def _without_times(status: Manifest) -> dict[str, Any]:
    kept = dict(status)
    kept["conditions"] = [
        {key: value for key, value in condition.items() if key != "lastTransitionTime"}
        for condition in status.get("conditions") or ()
    ]
    return kept
