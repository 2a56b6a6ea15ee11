"""Between plans and the words of a rollout: what a plan places and serves, what is observed, and the plan of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ensemble_contract.plan import EnsemblePlan, GatewayPlan, ModelSource, ServedMember
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.rollout.placement import Cell, Memory, Placement, Running, Service, Step, Version, Wanted

# By version, class of device and batch size: the bytes that an instance adds.
Needs = Mapping[tuple[Version, str, int], float]


def placement_of(plan: EnsemblePlan) -> Placement:
    """The instances of a plan."""
    versions = [(source.name, source.digest) for source in plan.sources]
    return frozenset(Cell(worker, *versions[at], size) for worker, row in plan.rows.items() for at, size in row)


def service_of(plan: GatewayPlan) -> Service:
    """What a gateway's plan serves. Which workers there are makes no difference to clients."""
    versions = tuple(Version(member.name, member.digest) for member in plan.members)
    nameless = [ServedMember(member.name, "", weight=member.weight) for member in plan.members]
    terms = msgspec.structs.replace(plan, generation=0, workers=(), members=tuple(nameless), hold=False)
    return Service(versions, msgspec.json.encode(terms, order="deterministic"), plan.hold)


def wanted(plan: EnsemblePlan, *, pause: bool) -> Wanted:
    """The plan to arrive at; its generation makes no difference."""
    return Wanted(placement_of(plan), service_of(plan.gateway), pause)


def running(plan: EnsemblePlan | None, states: Mapping[Cell, str], *, settled: bool) -> Running:
    """What is observed: the newest plan, and every instance that a worker reports with its state.

    `settled`: every gateway has adopted the newest plan and has no request left under a former one.
    """
    planned = placement_of(plan) if plan is not None else frozenset()
    return Running(
        planned,
        live=frozenset(cell for cell in planned if states.get(cell) == "ready"),
        service=service_of(plan.gateway) if plan is not None else None,
        settled=settled,
        failed=frozenset(cell for cell in planned if states.get(cell) == "failed"),
        lingering=frozenset(cell for cell, state in states.items() if state != "failed" and cell not in planned),
    )


def needs_of(problem: Problem, sources: Iterable[ModelSource]) -> dict[tuple[Version, str, int], float]:
    """What instances of these versions take, by the profiles of a problem whose members they are."""
    digests = {source.name: source.digest for source in sources}
    return {
        (Version(p.member, digests[p.member]), p.device_class, p.batch_size): p.memory_bytes
        for p in problem.profiles
        if p.member in digests
    }


def memory_of(problem: Problem, needs: Needs) -> Memory:
    """The memory of a problem's devices, each named as its worker; what is not in `needs` cannot be placed anew."""
    classes = {device.name: device.device_class for device in problem.devices}
    usable = {device.name: float(max(0, device.usable_bytes(problem.headroom))) for device in problem.devices}

    def need_bytes(cell: Cell) -> float:
        return needs.get((cell.version, classes.get(cell.worker, ""), cell.batch_size), float("inf"))

    return Memory(usable, need_bytes, problem.batch_sizes)


def plan_of(step: Step, generation: int, goal: EnsemblePlan, former: EnsemblePlan | None) -> EnsemblePlan:
    """The plan of a step on the way from `former` to `goal`, with the workers of the goal.

    A version that neither of the two has is an error of the caller: KeyError.
    """
    known = {Version(s.name, s.digest): s for plan in (former, goal) if plan is not None for s in plan.sources}
    used = dict.fromkeys([*step.service.versions, *sorted({cell.version for cell in step.placement})])
    indices = {version: at for at, version in enumerate(used)}
    rows: dict[str, list[tuple[int, int]]] = {worker: [] for worker in goal.rows}
    for cell in sorted(step.placement):
        rows.setdefault(cell.worker, []).append((indices[cell.version], cell.batch_size))
    return EnsemblePlan(
        gateway=_gateway(step.service, generation, goal.gateway, former.gateway if former is not None else None),
        sources=tuple(known[version] for version in used),
        rows={worker: tuple(row) for worker, row in rows.items()},
        row_cache_bytes=goal.row_cache_bytes,
    )


def _gateway(service: Service, generation: int, goal: GatewayPlan, former: GatewayPlan | None) -> GatewayPlan:
    """What gateways serve in a step: the goal, the former, or the former with some members changed or gone."""
    now: dict[str, Any] = {"generation": generation, "hold": service.hold, "workers": goal.workers}
    final = service_of(goal)
    if former is None or (service.versions, service.terms) == (final.versions, final.terms):
        return msgspec.structs.replace(goal, **now)
    old = {member.name: member for member in former.members}
    new = {member.name: member for member in goal.members}
    members = []
    for version in service.versions:
        member = old[version.member]
        if member.digest != version.digest:
            member = msgspec.structs.replace(new[version.member], weight=member.weight)
        members.append(member)
    quorum = len(members) if former.quorum == len(former.members) else min(former.quorum, len(members))
    return msgspec.structs.replace(former, **now, members=tuple(members), quorum=quorum)
