"""Gives workers and gateways their plans: the ConfigMap first, then everybody who does not have the newest yet."""

from __future__ import annotations

import asyncio
import logging

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.control.kinds import Key
from ensemble_operator.control.observe import GatewayView, Observed, Observer, WorkerView
from ensemble_operator.control.world import World
from ensemble_operator.fleet import Fleet, Refused, Unreachable

log = logging.getLogger(__name__)


class Pusher:
    """Pushes a plan to all who lack it."""

    def __init__(self, world: World, fleet: Fleet, observer: Observer) -> None:
        self._world, self._fleet, self._observer = world, fleet, observer

    async def push(self, key: Key, plan: EnsemblePlan, seen: Observed, token: str) -> bool:
        """Push a plan; whether everybody who answers has it now."""
        self._world.cluster.guard()
        behind = [w for w in seen.workers if w.report is not None and w.report.generation < plan.generation]
        late = [g for g in seen.gateways if g.state and max(g.state.generation, g.state.newest) < plan.generation]
        waiting = [
            *(self._to_worker(key, worker, plan, token) for worker in behind),
            *(self._to_gateway(key, gateway, plan, token) for gateway in late),
        ]
        return all(await asyncio.gather(*waiting))

    async def _to_worker(self, key: Key, view: WorkerView, plan: EnsemblePlan, token: str) -> bool:
        row = plan.worker(view.name)
        if row is None:
            # It is not part of this plan: it finds itself missing in the mirror.
            return True
        try:
            await self._fleet.put_plan(self._observer.address(key, view.pod), row, token)
        except Unreachable as error:
            return _not_taken(view.name, error)
        return True

    async def _to_gateway(self, key: Key, view: GatewayView, plan: EnsemblePlan, token: str) -> bool:
        try:
            await self._fleet.put_plan(self._observer.address(key, view.pod), plan.gateway, token)
        except Unreachable as error:
            return _not_taken(view.pod.name, error)
        return True


def _not_taken(name: str, error: Unreachable) -> bool:
    """Whoever has a newer plan, or is away, is looked at again."""
    level = logging.INFO if isinstance(error, Refused) and error.status == 409 else logging.WARNING
    log.log(level, "%s did not take the plan, and is asked again: %s", name, error)
    return False
