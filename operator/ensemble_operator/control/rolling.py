"""The stage of pushing: step after step from the plan that runs to the target, each written before it is told."""

from __future__ import annotations

import logging

import msgspec

from ensemble_contract.plan import EnsemblePlan
from ensemble_contract.pod import DATA_PORT, PLAN_FILE
from ensemble_operator.control import conditions as c
from ensemble_operator.control.book import HASHES_ANNOTATION, hashes_of, write_book
from ensemble_operator.control.observe import Observer, WorkerView
from ensemble_operator.control.onepass import Pass
from ensemble_operator.control.planning import row_cache_bytes, tensors_of
from ensemble_operator.control.profiling import note_failure
from ensemble_operator.control.push import Pusher
from ensemble_operator.control.stepping import (
    READY,
    goal_of,
    is_settled,
    memory_of,
    newest_plan,
    running_of,
    same_but_generation,
    states_of,
)
from ensemble_operator.control.target import write_mirror
from ensemble_operator.control.upkeep import Upkeep
from ensemble_operator.control.world import World
from ensemble_operator.fleet import Fleet
from ensemble_operator.manifests import plan_config_map, profiles_config_map
from ensemble_operator.rollout.placement import Blocked, Done, Failed, Outcome, Step, Waiting
from ensemble_operator.rollout.plans import placement_of, plan_of, wanted
from ensemble_operator.rollout.steps import next_step

log = logging.getLogger(__name__)

MIB = 1 << 20
# Between two looks at a change under way.
STEP_PERIOD_S, WAIT_PERIOD_S = 0.1, 0.5
BLOCKED_PERIOD_S = 30.0


class Rolling:
    """Goes towards the target, a step at a time."""

    def __init__(self, world: World, fleet: Fleet, observer: Observer, upkeep: Upkeep) -> None:
        self._observer, self._upkeep = observer, upkeep
        self._pusher = Pusher(world, fleet, observer)

    async def go_on(self, one: Pass) -> None:
        """Take the next step, or see to it that everybody has the present plan.

        Raises PlanTooLarge if the plan is, InvalidSpec if the tensors are unknown, and a ClusterError.
        """
        assert one.members is not None  # noqa: S101  planned
        assert one.target is not None  # noqa: S101
        look = one.look
        tensors = tensors_of(one.spec, one.members.sources, one.book)
        addresses = {
            v.name: self._observer.data_address(one.key, v.pod, DATA_PORT)
            for v in look.workers
            if v.name in one.devices
        }
        goal = goal_of(one.spec, one.members, tensors, one.target, addresses, row_cache_bytes(look))
        if one.no_room and await self._replace_held(one):
            return
        pause = one.spec.spec.rollout == "Pause"
        memory = memory_of(one.devices, one.needs)
        running = running_of(look, goal)
        outcome = next_step(running, wanted(goal, pause=pause), memory)
        if isinstance(outcome, Step):
            plan = plan_of(outcome, look.highest_generation + 1, goal, newest_plan(look))
            log.info("plan %d: %d loads, %d unloads", plan.generation, len(outcome.loads), len(outcome.unloads))
            await self._write(one, plan)
            one.again(STEP_PERIOD_S)
        elif isinstance(outcome, Done):
            await self._settle(one, goal)
        elif isinstance(outcome, Failed):
            self._note_failed(one, outcome)
            await self.keep(one)
            one.again(STEP_PERIOD_S)
        else:
            await self.keep(one)
            one.again(WAIT_PERIOD_S if isinstance(outcome, Waiting) else BLOCKED_PERIOD_S)
        self._say(one, outcome)

    async def keep(self, one: Pass) -> None:
        """See to it that everybody has the plan that was written last.

        Raises PlanTooLarge if it is, together with the target, and a ClusterError.
        """
        plan = one.look.mirror.plan
        if plan is None:
            return
        if c.ROLLOUT_BLOCKED not in one.found.said:
            message = "the plan that runs stays until the next one is known"
            one.found.say(c.ROLLOUT_BLOCKED, holds=False, reason="Waiting", message=message)
        if (better := _mended(one, plan)) is not None:
            await self._write(one, better)
            one.again(STEP_PERIOD_S)
            return
        await self._mirror(one, plan)
        if not await self._pusher.push(one.key, plan, one.look, one.token) or not is_settled(one.look, plan.generation):
            one.again(WAIT_PERIOD_S)

    async def write_book(self, one: Pass) -> None:
        """Write the profiles, if they are not as they were written last."""
        look = one.look
        if one.members is not None:
            plan = look.mirror.plan
            used = {s.digest for s in (*one.sources.values(), *one.members.sources.values())}
            used |= {s.digest for s in plan.sources} if plan is not None else set()
            one.book = one.book.only(used)
        one.memory.book = one.book
        if one.book.known or one.book.idle:
            data = write_book(one.book)
            manifest = profiles_config_map(one.spec, one.uid, data, {HASHES_ANNOTATION: hashes_of(data)})
            await self._upkeep.apply(one.key, [manifest], one.uid)

    async def _settle(self, one: Pass, goal: EnsemblePlan) -> None:
        """The target is reached: write what may still differ (addresses, the row cache), and replace an old pod."""
        look = one.look
        before = look.mirror.plan
        assert before is not None  # noqa: S101  a rollout that is done has a plan
        reached = wanted(goal, pause=False)
        step = Step(reached.placement, reached.service)
        if not same_but_generation(plan_of(step, before.generation, goal, before), before):
            await self._write(one, plan_of(step, look.highest_generation + 1, goal, before))
            one.again(STEP_PERIOD_S)
            return
        await self.keep(one)
        if one.draining and not one.no_room and is_settled(look, before.generation):
            await self._replace_emptied(one)

    async def _replace_emptied(self, one: Pass) -> None:
        view = next(v for v in one.look.workers if v.name == one.draining)
        if view.report is not None and not view.report.instances:
            await self._replace(one, view)

    async def _replace(self, one: Pass, view: WorkerView) -> None:
        one.memory.replaced.add(view.name)
        await self._upkeep.replace_pod(one.key, view.name, view.pod.uid)

    async def _replace_held(self, one: Pass) -> bool:
        """Where an old pod cannot be emptied and requests may be held: hold them, then replace it."""
        plan = one.look.mirror.plan
        if plan is None or one.spec.spec.rollout != "Pause" or not _is_reached(one, plan):
            return False
        if not plan.gateway.hold:
            held = msgspec.structs.replace(plan.gateway, hold=True, generation=one.look.highest_generation + 1)
            await self._write(one, msgspec.structs.replace(plan, gateway=held))
            one.again(STEP_PERIOD_S)
            return True
        await self.keep(one)
        if is_settled(one.look, plan.generation):
            await self._replace(one, next(v for v in one.look.workers if v.name == one.draining))
        one.again(WAIT_PERIOD_S)
        return True

    async def _write(self, one: Pass, plan: EnsemblePlan) -> None:
        """Write a plan to the ConfigMap, then tell everybody."""
        await self._mirror(one, plan)
        await self._pusher.push(one.key, plan, one.look, one.token)

    async def _mirror(self, one: Pass, plan: EnsemblePlan) -> None:
        """Write a plan, with the matrix that it leads to, to the ConfigMap."""
        data, annotations = write_mirror(plan, one.target or one.look.mirror.target)
        manifest = plan_config_map(one.spec, one.uid, data[PLAN_FILE], annotations)
        await self._upkeep.apply(one.key, [{**manifest, "data": data}], one.uid)
        if one.change is not None:
            one.events.append(one.change)
            one.change = None

    def _note_failed(self, one: Pass, outcome: Failed) -> None:
        """Remember what cannot be loaded: the next plan does without it until it is tried again."""
        errors = {
            (view.name, i.digest): i.error or "it failed without a reason"
            for view in one.look.workers
            if view.report is not None
            for i in view.report.instances
            if i.state == "failed"
        }
        for cell in outcome.cells:
            device, error = one.devices.get(cell.worker), errors.get((cell.worker, cell.digest))
            if device is not None and error is not None:
                one.book = note_failure(one.book, cell.digest, device.device_class, error, one.now)

    def _say(self, one: Pass, outcome: Outcome) -> None:
        if isinstance(outcome, Blocked):
            missing = outcome.missing_bytes
            lack = f"{-int(-missing // MIB)} MiB are missing" if missing < float("inf") else "its memory is not known"
            message = (
                f"no order of changes leads to the plan: for {outcome.member} at batch size {outcome.batch_size} on"
                f" {outcome.worker} {lack}; the plan that runs stays. Add a device, lower memoryHeadroom, or set"
                " spec.rollout: Pause to let requests wait during the change"
            )
            one.found.say(c.ROLLOUT_BLOCKED, holds=True, reason="NoMemoryOnTheWay", message=message)
        elif one.no_room:
            message = f"{one.no_room}. Add a device, or set spec.rollout: Pause to let requests wait meanwhile"
            one.found.say(c.ROLLOUT_BLOCKED, holds=True, reason="NoRoomToReplace", message=message)
        elif isinstance(outcome, Done):
            one.found.say(c.ROLLOUT_BLOCKED, holds=False, reason="Done", message="the plan that is wanted runs")
        else:
            one.found.say(c.ROLLOUT_BLOCKED, holds=False, reason="Rolling", message="a change is under way")


def _mended(one: Pass, plan: EnsemblePlan) -> EnsemblePlan | None:
    """A plan to write in place of the present one: nobody takes it, or it holds requests for a pod that cannot come."""
    troubled = {view.name for view in one.look.workers if view.pod.trouble}
    in_vain = plan.gateway.hold and any(row and worker in troubled for worker, row in plan.rows.items())
    if not in_vain and plan.generation >= one.look.highest_generation:
        return None
    hold = plan.gateway.hold and not in_vain
    gateway = msgspec.structs.replace(plan.gateway, hold=hold, generation=one.look.highest_generation + 1)
    return msgspec.structs.replace(plan, gateway=gateway)


def _is_reached(one: Pass, plan: EnsemblePlan) -> bool:
    """Whether the plan has the target's instances, and all of them run."""
    assert one.target is not None  # noqa: S101  planned
    states = states_of(one.look)
    cells = placement_of(plan)
    same = {(cell.worker, cell.member, cell.batch_size) for cell in cells} == set(one.target.cells())
    return same and all(states.get(cell) == READY for cell in cells)
