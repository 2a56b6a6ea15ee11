"""What a change did, as documents that cross the runner's socket, and what the status of an ensemble says. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.allocation.memory import used_bytes
from ensemble_operator.serve.observation import Observed
from ensemble_operator.serve.preparation import Planned

MAX_STATUS_ROWS = 64


class Allocation(msgspec.Struct, frozen=True, rename="camel"):
    """A matrix: by device, the batch size of each member there, and the bytes taken and there; and what it promises."""

    members: tuple[str, ...]
    rows: dict[str, dict[str, int]]
    used_bytes: dict[str, float]
    capacity_bytes: dict[str, int]
    predicted_rows_per_s: float


class Change(msgspec.Struct, frozen=True, rename="camel"):
    """What a change did to the members and to the matrix; no steps: everything was as wanted already."""

    name: str
    url: str
    steps: int
    seconds: float
    before: Allocation
    after: Allocation
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Told(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A line of the answer to a new resource: something to know, or, last, what was done or why not."""

    note: str | None = None
    warning: str | None = None
    change: Change | None = None
    error: str | None = None
    exit_code: int = 0


def allocation_of(planned: Planned) -> Allocation:
    """The matrix of a plan; bytes include what an idle worker and the rows take."""
    problem, matrix = planned.problem, planned.matrix
    used = used_bytes(problem, matrix).tolist()
    return Allocation(
        members=tuple(member.name for member in planned.ensemble.spec.members),
        rows={device: matrix.row(at) for at, device in enumerate(matrix.devices)},
        used_bytes={d.name: used[at] + d.overhead_bytes for at, d in enumerate(problem.devices)},
        capacity_bytes={d.name: d.capacity_bytes for d in problem.devices},
        predicted_rows_per_s=planned.predicted_rows_per_s,
    )


def change_of(before: Planned, after: Planned, url: str, steps: int, seconds: float) -> Change:
    """What was changed from one plan to another."""
    old, new = before.sources, after.sources
    return Change(
        name=after.ensemble.name,
        url=url,
        steps=steps,
        seconds=seconds,
        before=allocation_of(before),
        after=allocation_of(after),
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
        replaced=tuple(name for name in new if name in old and new[name].digest != old[name].digest),
    )


def status_of(planned: Planned, plan: EnsemblePlan, observed: Observed, *, changing: bool) -> dict[str, Any]:
    """The ensemble in the form of the resource's status; `changing` while a rollout is under way."""
    gateway, allocation = observed.gateway, allocation_of(planned)
    names = [member.name for member in plan.gateway.members]
    live = {member.name for member in gateway.members if member.live} if gateway else set()
    missing = [name for name in names if name not in live]
    answering = len(names) - len(missing)
    held = sum(report is not None for report in observed.workers.values())
    ready = gateway is not None and gateway.ready
    rows = [
        {
            "worker": name,
            "deviceClass": planned.devices[name].device_class,
            "usedBytes": int(allocation.used_bytes[name]),
            "capacityBytes": allocation.capacity_bytes[name],
            "instances": [{"member": plan.sources[at].name, "batchSize": size} for at, size in row],
        }
        for name, row in plan.rows.items()
    ]
    return {
        "conditions": [
            _condition("Ready", ready, "Serving" if ready else "Starting", ""),
            _condition("Degraded", bool(missing), "MembersMissing" if missing else "AllLive", ", ".join(missing)),
            _condition("Progressing", changing, "Changing" if changing else "Settled", ""),
        ],
        "phase": "Changing" if changing else "Degraded" if ready and missing else "Ready" if ready else "Starting",
        "replicas": len(plan.rows),
        "devices": {"wanted": len(plan.rows), "held": held, "summary": f"{held}/{len(plan.rows)}"},
        "allocation": {
            "generation": plan.generation,
            "instances": sum(map(len, plan.rows.values())),
            "omittedRows": max(0, len(rows) - MAX_STATUS_ROWS),
            "rows": rows[:MAX_STATUS_ROWS],
        },
        "throughput": {"predicted": planned.predicted_rows_per_s, "bound": planned.bound_rows_per_s},
        "members": {"total": len(names), "live": answering, "summary": f"{answering}/{len(names)}"},
        "url": f"{gateway.url}/v2/models/{planned.ensemble.name}" if gateway else "",
    }


def _condition(kind: str, holds: bool, reason: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": "True" if holds else "False", "reason": reason, "message": message}
