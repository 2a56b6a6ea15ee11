"""From the plan that runs to another, on this machine: observe, ask for the next step, push it, until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.errors import EnsembleError
from ensemble_operator.rollout import plans
from ensemble_operator.rollout.placement import Blocked, Cell, Done, Failed, Memory, Running, Step, Waiting
from ensemble_operator.rollout.steps import next_step
from ensemble_operator.serve.deployment import Deployment
from ensemble_operator.serve.observation import Observed

MIB = 1 << 20
LOOK_EVERY_S = 0.05
SAY_EVERY_S = 5.0


class NoWay(EnsembleError):
    """No order of changes fits the memory of the devices; the message names the device and what is missing."""


class VersionFailed(EnsembleError):
    """A version of a member can be loaded on none of the devices that it is planned for; the message has the cause."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The plan to arrive at, what every instance on the way takes, and whether requests may be held meanwhile."""

    plan: EnsemblePlan
    memory: Memory
    pause: bool


async def walk(deployment: Deployment, goal: Goal, note: Callable[[str], None]) -> int:
    """Go there while requests run; the number of plans that it took.

    Raises NoWay, VersionFailed or PlanNotKept; a plan on the way runs then, or, if no step was taken, the former one.
    """
    clock = asyncio.get_running_loop().time
    wanted = plans.wanted(goal.plan, pause=goal.pause)
    taken, said_at = 0, clock()
    while True:
        observed = await deployment.observe()
        outcome = await asyncio.to_thread(next_step, running(deployment.plan, observed), wanted, goal.memory)
        if isinstance(outcome, Done):
            return taken
        if isinstance(outcome, Blocked):
            raise NoWay(_blocked_text(outcome))
        if isinstance(outcome, Failed):
            raise VersionFailed(_failed_text(outcome, observed))
        if isinstance(outcome, Step):
            taken, said_at = taken + 1, clock()
            note(f"step {taken}: {_step_text(outcome, deployment.plan)}")
            generation = 1 + max(deployment.plan.generation, observed.newest_generation)
            await deployment.push(plans.plan_of(outcome, generation, goal.plan, deployment.plan))
        elif clock() - said_at >= SAY_EVERY_S:
            said_at = clock()
            note(f"waiting for {_waiting_text(outcome)}")
        await asyncio.sleep(LOOK_EVERY_S)


def running(plan: EnsemblePlan, observed: Observed) -> Running:
    """What a look at the processes says, in the words of a rollout; what a worker that is given up holds has failed."""
    states = {
        Cell(worker, i.member, i.digest, i.batch_size): i.state
        for worker, report in observed.workers.items()
        if report is not None
        for i in report.instances
    }
    states |= {cell: "failed" for cell in plans.placement_of(plan) if cell.worker in observed.given_up}
    gateway = observed.gateway
    settled = gateway is not None and gateway.generation == gateway.newest == plan.generation and not gateway.retiring
    return plans.running(plan, states, settled=settled)


def _blocked_text(blocked: Blocked) -> str:
    return (
        f"there is no order of changes that fits the memory: {blocked.missing_bytes / MIB:,.1f} MiB are missing on "
        f"device {blocked.worker!r} to load {blocked.member!r} at batch size {blocked.batch_size} beside what serves; "
        "allow `rollout: Pause` (requests then wait during the change), lower spec.batching.sizes or drop a member"
    )


def _failed_text(failed: Failed, observed: Observed) -> str:
    causes = [_cause(cell, observed) for cell in failed.cells]
    return f"member {failed.version.member!r} cannot be loaded: {next(filter(None, causes), 'nobody says why')}"


def _cause(cell: Cell, observed: Observed) -> str:
    report = observed.workers.get(cell.worker)
    if cell.worker in observed.given_up or report is None:
        return observed.given_up.get(cell.worker, "")
    return next((i.error for i in report.instances if (i.member, i.digest) == cell.version and i.error), "")


def _step_text(step: Step, before: EnsemblePlan) -> str:
    parts = [f"load {_cells(step.loads)}"] if step.loads else []
    parts += [f"unload {_cells(step.unloads)}"] if step.unloads else []
    if step.service != plans.service_of(before.gateway):
        parts.append("hold requests" if step.service.hold else "switch")
    return "; ".join(parts)


def _waiting_text(waiting: Waiting) -> str:
    parts = [f"{_cells(waiting.loads)} to load"] if waiting.loads else []
    parts += [f"{_cells(waiting.unloads)} to end"] if waiting.unloads else []
    return " and ".join(parts) or "the gateway to change"


def _cells(cells: tuple[Cell, ...]) -> str:
    shown = ", ".join(f"{cell.member} x{cell.batch_size} on {cell.worker}" for cell in cells[:8])
    return f"{shown} and {len(cells) - 8} more" if len(cells) > 8 else shown
