"""The one sequence, from whatever is there towards what the resource asks for, as far as is possible now.

Observe, accept, children, acquire, profile, plan, push, report. Every stage decides by what is observed, so that an
operator that was killed at any of them goes on there; a stage that cannot be done ends the sequence, and is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ensemble_operator.api import parse
from ensemble_operator.control import conditions as c
from ensemble_operator.control.acquiring import Acquiring
from ensemble_operator.control.conditions import treatment_of
from ensemble_operator.control.kinds import Key
from ensemble_operator.control.measure import Measuring
from ensemble_operator.control.observe import Observer
from ensemble_operator.control.onepass import Memory, Pass
from ensemble_operator.control.overrides import check_allowed, remarks
from ensemble_operator.control.planner import Planner
from ensemble_operator.control.planstage import Planning
from ensemble_operator.control.report import Reporter
from ensemble_operator.control.rolling import Rolling
from ensemble_operator.control.upkeep import Upkeep
from ensemble_operator.control.world import Outcome, World
from ensemble_operator.fleet import Fleet
from ensemble_operator.manifests import ChildSettings


class Reconciler:
    """Reconciles ensembles, one call at a time for each. Made in the loop that it runs in; `close` it at the end."""

    def __init__(self, world: World, clock: Callable[[], float] = time.time) -> None:
        self._world, self._clock = world, clock
        self._fleet, self._planner = Fleet(), Planner()
        self._observer = Observer(world.store, self._fleet, world.settings)
        self._upkeep = Upkeep(world)
        self._acquiring = Acquiring(world, self._upkeep, child_settings(world))
        self._rolling = Rolling(world, self._fleet, self._observer, self._upkeep)
        self._measuring = Measuring(world, self._fleet, self._observer, self._rolling.write_book)
        self._planning = Planning(self._planner)
        self._reporter = Reporter(world)
        self._memories: dict[Key, tuple[str, Memory]] = {}

    async def close(self) -> None:
        """End the planning process and the connections to pods."""
        await self._planner.close()
        await self._fleet.close()

    async def reconcile(self, key: Key) -> Outcome:
        """Look at one ensemble, and do what can be done now.

        Raises what says nothing about the ensemble: the API server away, a conflict, leadership lost; and, once it is
        reported, what nobody has foreseen.
        """
        document = self._world.store.ensemble(key)
        if document is None:
            self._forget(key)
            return Outcome()
        if document["metadata"].get("deletionTimestamp"):
            return Outcome()
        one = Pass(key, document, self._clock(), self._memory(key, str(document["metadata"]["uid"])))
        unforeseen: Exception | None = None
        try:
            await self._bring(one)
        except c.PASSING:
            raise
        except Exception as error:
            unforeseen = _note(one, error)
        await self._reporter.report(one)
        if unforeseen is not None:
            raise unforeseen
        return Outcome(one.retry_s)

    async def _bring(self, one: Pass) -> None:
        """The sequence, up to the stage that cannot be done yet."""
        await self._look(one)
        self._reporter.judge(one)
        await self._acquiring.go_on(one)
        try:
            if await self._measuring.go_on(one) and await self._planning.go_on(one):
                await self._rolling.go_on(one)
                await self._measuring.share(one)
            else:
                await self._rolling.keep(one)
        finally:
            await self._rolling.write_book(one)
            self._reporter.judge(one)

    async def _look(self, one: Pass) -> None:
        one.ensemble = parse(one.document)
        check_allowed(one.spec, allow_overrides=self._world.settings.allow_overrides)
        said = remarks(one.spec)
        one.found.say(c.ACCEPTED, holds=True, reason="Accepted", message=said or "the resource is valid")
        one.token = (await self._upkeep.keyring(one.key, one.spec, one.uid)).token
        one.again(max(1.0, self._upkeep.look_again_s(one.key)))
        one.seen = await self._observer.ask(one.key, self._observer.children(one.key), one.token)
        one.book = one.memory.book if one.look.book is None else one.look.book
        if any(w.refused for w in one.look.workers) or any(g.refused for g in one.look.gateways):
            self._upkeep.forget_keys(one.key)

    def _memory(self, key: Key, uid: str) -> Memory:
        known = self._memories.get(key)
        if known is None or known[0] != uid:
            known = (uid, Memory())
            self._memories[key] = known
        return known[1]

    def _forget(self, key: Key) -> None:
        self._memories.pop(key, None)
        self._upkeep.forget(key)
        self._observer.forget(key)


def _note(one: Pass, error: Exception) -> Exception | None:
    """Make a condition of an error; the error if nobody has foreseen it."""
    treatment = treatment_of(error)
    if treatment is None:
        one.found.fail_unexpectedly(error)
        return error
    one.found.fail(error, treatment)
    if treatment.retry_s is not None:
        one.again(treatment.retry_s)
    return None


def child_settings(world: World) -> ChildSettings:
    """What the operator's settings decide about children."""
    settings = world.settings
    return ChildSettings(
        worker_image=settings.worker_image,
        gateway_image=settings.gateway_image,
        image_pull_policy=settings.image_pull_policy or "IfNotPresent",
        image_pull_secrets=settings.image_pull_secrets,
        operator_namespace=settings.pod_namespace if settings.pod_name else "",
    )
