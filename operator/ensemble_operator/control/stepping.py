"""The rollout's question, from what a reconcile sees: where to go, what runs, what memory there is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.control.observe import Observed
from ensemble_operator.control.planning import Members
from ensemble_operator.control.target import Target, TargetDevice
from ensemble_operator.plans import Tensors, gateway_plan
from ensemble_operator.rollout import plans
from ensemble_operator.rollout.placement import Cell, Memory, Running

READY = "ready"
FAILED = "failed"
INFINITE = float("inf")

# By digest, class of device and batch size: the bytes that an instance adds.
Needs = Mapping[tuple[str, str, int], float]


def goal_of(
    ensemble: InferenceEnsemble,
    members: Members,
    tensors: Tensors,
    target: Target,
    addresses: Mapping[str, str],
    row_cache_bytes: int,
) -> EnsemblePlan:
    """The plan to arrive at, of generation 0, with a row for every worker at `addresses`."""
    spec = ensemble.spec
    served = tuple(member for member in spec.members if member.name in members.sources)
    combine = replace(spec.combine, quorum=min(spec.combine.quorum, len(served)))
    now = replace(ensemble, spec=replace(spec, members=served, combine=combine))
    sources = tuple(members.sources.values())
    index = {(source.name, source.digest): at for at, source in enumerate(sources)}
    rows = {
        worker: tuple((index[target.digests[member]], size) for member, size in target.rows.get(worker, ()))
        for worker in sorted(addresses)
    }
    gateway = gateway_plan(now, 0, members.sources, tensors, dict(sorted(addresses.items())))
    return EnsemblePlan(gateway, sources, rows, row_cache_bytes)


def states_of(seen: Observed) -> dict[Cell, str]:
    """Every instance that a worker reports, with its state."""
    return {
        Cell(view.name, i.member, i.digest, i.batch_size): i.state
        for view in seen.workers
        if view.report is not None
        for i in view.report.instances
    }


def newest_plan(seen: Observed) -> EnsemblePlan | None:
    """The plan in the ConfigMap; None where pods have a newer one: somebody has restored a former ConfigMap."""
    plan = seen.mirror.plan
    return None if plan is None or plan.generation < seen.highest_generation else plan


def running_of(seen: Observed, goal: EnsemblePlan) -> Running:
    """What runs: the newest plan, and what workers and gateways make of it.

    Where the plan was lost, what workers report is what was planned: they still have it.
    """
    plan, states = newest_plan(seen), states_of(seen)
    if plan is not None:
        return plans.running(plan, states, settled=is_settled(seen, plan.generation))
    known = {(source.name, source.digest) for source in goal.sources}
    planned = frozenset(cell for cell in states if cell.version in known)
    return Running(
        planned=planned,
        live=frozenset(cell for cell in planned if states[cell] == READY),
        service=None,
        failed=frozenset(cell for cell in planned if states[cell] == FAILED),
        lingering=frozenset(states) - planned,
    )


def is_settled(seen: Observed, generation: int) -> bool:
    """Whether every gateway that may have clients serves this plan, with no request left under a former one."""
    for view in seen.gateways:
        state = view.state
        if state is None:
            if view.pod.ready and not view.pod.leaving:
                return False
        elif state.generation != generation or state.retiring:
            return False
    return True


def memory_of(devices: Mapping[str, TargetDevice], needs: Needs) -> Memory:
    """What devices have and instances take; what is not in `needs` cannot be placed anew."""

    def need_bytes(cell: Cell) -> float:
        device = devices.get(cell.worker)
        return INFINITE if device is None else needs.get((cell.digest, device.device_class, cell.batch_size), INFINITE)

    sizes = tuple(sorted({size for _, _, size in needs}))
    return Memory({worker: float(device.usable_bytes) for worker, device in devices.items()}, need_bytes, sizes)


def same_but_generation(one: EnsemblePlan, other: EnsemblePlan) -> bool:
    """Whether two plans differ in their generation at most."""
    gateway = msgspec.structs.replace(one.gateway, generation=other.generation)
    return msgspec.structs.replace(one, gateway=gateway) == other
