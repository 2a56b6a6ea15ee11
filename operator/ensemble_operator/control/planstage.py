"""The stage of planning: the matrix to go to, asked of the planning process only when something has changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ensemble_operator.allocation.errors import AllocationError
from ensemble_operator.control import conditions as c
from ensemble_operator.control.failing import matrix_key
from ensemble_operator.control.onepass import Pass, Refusal, Unfitting
from ensemble_operator.control.planner import Planner
from ensemble_operator.control.planning import (
    answered,
    live_devices,
    members_to_serve,
    need_bytes,
    overheads_of,
    question,
    target_of,
)
from ensemble_operator.control.pods import COMING_S
from ensemble_operator.control.profiling import failures, measured, note_declared
from ensemble_operator.control.questions import DOES_NOT_FIT, PlanAnswer, PlanQuestion
from ensemble_operator.control.returning import returning
from ensemble_operator.control.status import plan_changed
from ensemble_operator.control.target import Target, TargetDevice

log = logging.getLogger(__name__)

COMING_PERIOD_S = 1.0
MAX_NAMED = 8


class Planning:
    """Finds the target of an ensemble."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    async def go_on(self, one: Pass) -> bool:
        """Set the target; whether there is one to go to.

        Raises PlannerFailed.
        """
        prepare(one)
        target = one.look.mirror.target
        if not one.devices or self._waits(one):
            return False
        try:
            if self._is_back_soon(one, target):
                return False
            one.target = await self._target(one, target, _to_use(one))
        except AllocationError as error:
            if one.draining and await self._without_room(one, target, error):
                return True
            return self._refused(one, error)
        one.memory.refused = None
        self._say(one, target)
        return True

    def _waits(self, one: Pass) -> bool:
        """Whether pods are on their way with which the plan would be another one."""
        target, now = one.look.mirror.target, one.now
        known = target.devices if target is not None else {}
        coming = [v for v in one.look.workers if not v.holds and v.pod.is_coming(now) and v.name not in known]
        if not coming:
            one.memory.coming_since = None
            return False
        if one.memory.coming_since is None:
            one.memory.coming_since = now
        if now - one.memory.coming_since > COMING_S:
            return False
        one.again(COMING_PERIOD_S)
        if target is None:
            names = ", ".join(view.name for view in coming[:MAX_NAMED])
            one.found.say(c.PLANNED, holds=False, reason="Waiting", message=f"workers are starting: {names}")
        return True

    def _is_back_soon(self, one: Pass, target: Target | None) -> bool:
        """Whether all that differs from the question that was answered are workers that come back in a moment."""
        missing = returning(one.spec, one.look)
        if target is None or not missing:
            one.memory.returning_since = None
            return False
        if one.memory.returning_since is None:
            one.memory.returning_since = one.now
        if one.now - one.memory.returning_since > COMING_S:
            return False
        former = {worker: device for worker in missing if (device := target.device(worker)) is not None}
        assert one.members is not None  # noqa: S101  prepared
        asked = question(one.spec, one.members, {**_to_use(one), **former}, one.measured, (), one.book.factors())
        one.again(COMING_PERIOD_S)
        return asked.identity in (target.question, target.examined)

    async def _without_room(self, one: Pass, target: Target | None, error: AllocationError) -> bool:
        """Nothing fits beside the worker that is to be replaced: plan with it; whether that works."""
        name = one.draining
        try:
            one.target = await self._target(one, target, {**_to_use(one), name: one.devices[name]})
        except AllocationError:
            return False
        one.no_room = f"worker {name} has an old pod template and cannot be replaced: {error}"
        self._say(one, target)
        return True

    async def _target(self, one: Pass, before: Target | None, devices: Mapping[str, TargetDevice]) -> Target:
        assert one.members is not None  # noqa: S101  prepared
        running = before.cells() if before is not None else ()
        one.asked = asked = question(one.spec, one.members, devices, one.measured, running, one.book.factors())
        if (known := answered(asked, before)) is not None:
            return known
        if one.memory.refused is not None and one.memory.refused[0] == asked.identity:
            raise one.memory.refused[1]
        return target_of(asked, await self._ask(one, asked), devices, before)

    async def _ask(self, one: Pass, asked: PlanQuestion) -> PlanAnswer:
        answer = await self._planner.plan(asked)
        if not answer.error:
            log.info("planned in %.2f s: %.6g rows/s predicted", answer.seconds, answer.predicted_rows_per_s)
            return answer
        error = Unfitting(answer.error) if answer.kind == DOES_NOT_FIT else Refusal(answer.error)
        one.memory.refused = (asked.identity, error)
        raise error

    def _refused(self, one: Pass, error: AllocationError) -> bool:
        reason = "DoesNotFit" if isinstance(error, Unfitting) else "InvalidProblem"
        message = str(error)
        if one.look.mirror.plan is not None:
            message += "; the plan that runs stays"
        one.found.say(c.PLANNED, holds=False, reason=reason, message=message)
        return False

    def _say(self, one: Pass, before: Target | None) -> None:
        target = one.target
        assert target is not None  # noqa: S101  the caller has set it
        if before is None or target.rows != before.rows or target.digests != before.digests:
            tell_change(one, before, target)
        gap = 1 - target.predicted_rows_per_s / target.bound_rows_per_s if target.bound_rows_per_s > 0 else 0.0
        message = (
            f"{target.predicted_rows_per_s:.6g} rows/s predicted, {max(0.0, gap):.0%} below the bound; {target.why}"
        )
        one.found.say(c.PLANNED, holds=True, reason="Planned", message=message)


def tell_change(one: Pass, before: Target | None, target: Target) -> None:
    """Have it told that the matrix is another, but not for every further attempt at a member that fails."""
    memory, key = one.memory, matrix_key(target)
    if not memory.failing:
        memory.matrices.clear()
    elif key in memory.matrices:
        return
    memory.matrices.add(key)
    one.change = plan_changed(before, target)


def prepare(one: Pass) -> None:
    """What planning and rolling work with: versions, profiles, devices, memory."""
    look = one.look
    classes = _classes(one)
    one.book = note_declared(one.book, one.spec, one.sources, classes)
    one.failures = failures(one.spec, one.sources, classes, one.book, one.now)
    one.members = members_to_serve(one.spec, one.failures, look.mirror.plan)
    one.measured = measured(one.spec, one.members.sources, classes, one.book, one.now)
    one.devices = live_devices(one.spec, look, overheads_of(classes, one.measured), one.now)
    one.needs = need_bytes(one.members, one.measured, one.book, look)


def _classes(one: Pass) -> list[str]:
    found = [v.device.device_class for v in one.look.workers if v.holds and v.device is not None]
    target = one.look.mirror.target
    if target is not None:
        found += [device.device_class for device in target.classes]
    return list(dict.fromkeys(found))


def _to_use(one: Pass) -> dict[str, TargetDevice]:
    """The devices to plan with: those wanted and there, without one that is to be emptied."""
    pods = {v.name: v.pod for v in one.look.workers}
    return {
        worker: device
        for worker, device in one.devices.items()
        if worker != one.draining and one.is_wanted(pods[worker])
    }
