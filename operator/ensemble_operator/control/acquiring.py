"""The stage of devices: pods for all that are wanted, at once; who holds what; and why others do not come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ensemble_operator.api import Devices
from ensemble_operator.control import conditions as c
from ensemble_operator.control.acquire import Patience, Waiting, patience, replicas
from ensemble_operator.control.census import MAX_AGE_S, Census
from ensemble_operator.control.inventory import resource_of, shortage
from ensemble_operator.control.kinds import DEPLOYMENT, STATEFUL_SET, Manifest
from ensemble_operator.control.observe import NONE
from ensemble_operator.control.onepass import Pass
from ensemble_operator.control.replacing import next_to_empty, useless
from ensemble_operator.control.status import ACQUIRE_TIMEOUT, NO_DEVICE_VISIBLE, PODS_NOT_CREATED
from ensemble_operator.control.times import rfc3339
from ensemble_operator.control.uncreated import workers_not_created
from ensemble_operator.control.upkeep import Upkeep
from ensemble_operator.control.world import World
from ensemble_operator.manifests import TEMPLATE, Children, ChildSettings, children, pool_name

COMING_PERIOD_S = 2.0
# A StatefulSet's controller makes its pods at once, where nobody refuses them.
CREATED_WITHIN_S = 5.0


class Acquiring:
    """Keeps an ensemble's children, and among them as many workers as it shall have."""

    def __init__(self, world: World, upkeep: Upkeep, settings: ChildSettings) -> None:
        self._upkeep, self._settings, self._world = upkeep, settings, world
        self._census = Census(world)

    async def go_on(self, one: Pass) -> None:
        """Apply the children, and say which devices are held.

        Raises a ClusterError, or NameTaken.
        """
        pools = one.pools
        one.wanted = sum(pool.count for pool in pools)
        one.held = tuple(v for v in one.look.workers if v.holds and not v.pod.leaving and one.is_wanted(v.pod))
        stuck = one.look.mirror.target is None and one.memory.does_not_fit
        first = one.look.stateful_sets.get(pool_name(one.key.name, 0))
        waiting = Waiting(fits=one.look.mirror.target is not None, lacking=stuck or len(one.held) < one.wanted)
        before = Patience.read(((first or {}).get("metadata") or {}).get("annotations") or {})
        now = patience(before, waiting, pools[0].acquire_timeout_s, one.now, str(one.key), one.generation)
        manifests = self._manifests(one, pools, now)
        await self._upkeep.apply(one.key, manifests, one.uid)
        await self._upkeep.remove_surplus(one.key, manifests, _surplus_in_use(one, pools), one.uid)
        await self._upkeep.free_stuck_pods(one.key, one.look, one.now)
        await self._replace_outdated(one, manifests)
        await self._say(one, pools, now)

    def _manifests(self, one: Pass, pools: Sequence[Devices], patience_now: Patience) -> tuple[Manifest, ...]:
        look = one.look
        in_use = _highest_in_use(one, len(pools))
        counts = []
        for pool, devices in enumerate(pools):
            live = look.stateful_sets.get(pool_name(one.key.name, pool))
            present = int(live["spec"].get("replicas", 1)) if live is not None else None
            released = patience_now.retry_at is not None
            counts.append(replicas(devices.count, present, in_use[pool], released=released))
        running: dict[tuple[str, str], Any] = {(STATEFUL_SET.name, name): m for name, m in look.stateful_sets.items()}
        running |= {(DEPLOYMENT.name, name): m for name, m in look.deployments.items()}
        made = children(Children(one.spec, one.uid, self._settings, tuple(counts)), running)
        return tuple(_with_patience(manifest, one.key.name, patience_now) for manifest in made)

    async def _replace_outdated(self, one: Pass, manifests: Sequence[Manifest]) -> None:
        """Delete pods of a former template that serve nothing; of the others choose the next to be emptied."""
        templates = {
            pool: _template_of(manifest)
            for pool, manifest in enumerate(m for m in manifests if m["kind"] == STATEFUL_SET.name)
        }
        plan = one.look.mirror.plan
        placed = {worker for worker, row in plan.rows.items() if row} if plan is not None else set[str]()
        for view in useless(one.look.workers, templates, placed):
            await self._upkeep.replace_pod(one.key, view.name, view.pod.uid)
        one.draining = next_to_empty(one.look.workers, templates, _names(one), one.memory.replaced)

    async def _say(self, one: Pass, pools: Sequence[Devices], now: Patience) -> None:
        held, wanted = len(one.held), one.wanted
        if now.retry_at is not None:
            one.again(max(1.0, now.retry_at - one.now))
            message = (
                f"not enough devices came within acquireTimeout; given back, and tried again at {rfc3339(now.retry_at)}"
            )
            if one.memory.does_not_fit and one.memory.refused is not None:
                message = f"{one.memory.refused[1]}; {message}"
            one.found.say(c.DEVICES_ACQUIRED, holds=False, reason=ACQUIRE_TIMEOUT, message=message)
            return
        if held >= wanted:
            classes = sorted({v.device.device_class for v in one.held if v.device is not None})
            message = f"{held} of {wanted} devices held ({', '.join(classes)})"
            one.found.say(c.DEVICES_ACQUIRED, holds=True, reason="DevicesAcquired", message=message)
            return
        if now.waiting_since is not None:
            one.again(max(1.0, min(MAX_AGE_S, now.waiting_since + pools[0].acquire_timeout_s - one.now + 1)))
        blind = next((v for v in one.look.workers if v.device is not None and v.device.kind == NONE), None)
        broken = next((v for v in one.look.workers if v.pod.trouble), None)
        if blind is not None and blind.device is not None:
            message = f"{held} of {wanted} devices held; {blind.name}: {blind.device.error or 'no device is visible'}"
            one.found.say(c.DEVICES_ACQUIRED, holds=False, reason=NO_DEVICE_VISIBLE, message=message)
            one.again(MAX_AGE_S)
        elif broken is not None:
            message = f"{held} of {wanted} devices held; pod {broken.name}: {broken.pod.trouble}"
            one.found.say(c.DEVICES_ACQUIRED, holds=False, reason="PodsFail", message=message)
            one.again(MAX_AGE_S)
        else:
            await self._say_shortage(one, pools)

    async def _say_shortage(self, one: Pass, pools: Sequence[Devices]) -> None:
        if missing := self._not_created(one):
            one.again(MAX_AGE_S)
            message = f"{len(one.held)} of {one.wanted} devices held; {missing}"
            one.found.say(c.DEVICES_ACQUIRED, holds=False, reason=PODS_NOT_CREATED, message=message)
            return
        unplaced = [v.pod for v in one.look.workers if v.pod.unschedulable and not v.pod.leaving]
        if not unplaced:
            one.again(COMING_PERIOD_S)
            message = f"{len(one.held)} of {one.wanted} devices held; the pods of the others are starting"
            silent = next((v for v in one.look.workers if v.silence and v.pod.ip), None)
            if silent is not None:
                message += f" ({silent.name}: {silent.silence})"
            one.found.say(c.DEVICES_ACQUIRED, holds=False, reason="Starting", message=message)
            return
        one.again(MAX_AGE_S)
        pool = min(unplaced[0].pool, len(pools) - 1)
        held = sum(v.pod.pool == pool for v in one.held)
        found = await self._census.supply(one.spec, pool)
        self._world.instruments.free_devices(None if found is None else found.free_count)
        message = shortage(pools[pool], pools[pool].count, held, found, unplaced[0].unschedulable)
        if found is not None and not found.total:
            message += f"; nothing in this cluster offers {resource_of(pools[pool])}"
        one.found.say(c.DEVICES_ACQUIRED, holds=False, reason="TooFewDevices", message=message)

    @staticmethod
    def _not_created(one: Pass) -> str:
        """Which pods have been missing for a while, and who knows why; empty if none."""
        missing, memory = workers_not_created(one.key.name, len(one.pools), one.look), one.memory
        if not missing:
            memory.uncreated_since = None
            return ""
        memory.uncreated_since = one.now if memory.uncreated_since is None else memory.uncreated_since
        return missing if one.now - memory.uncreated_since >= CREATED_WITHIN_S else ""


def _names(one: Pass) -> set[str]:
    """The names of all workers that there shall be."""
    return {f"{pool_name(one.key.name, at)}-{n}" for at, devices in enumerate(one.pools) for n in range(devices.count)}


def _used(one: Pass) -> set[str]:
    """Workers on which something runs or is planned to."""
    plan = one.look.mirror.plan
    used = {worker for worker, row in plan.rows.items() if row} if plan is not None else set()
    return used | {v.name for v in one.look.workers if v.report is not None and v.report.instances}


def _highest_in_use(one: Pass, pools: int) -> list[int]:
    highest = [-1] * pools
    used = _used(one)
    for pool in range(pools):
        prefix = re.escape(pool_name(one.key.name, pool))
        for worker in used:
            if found := re.fullmatch(rf"{prefix}-(\d+)", worker):
                highest[pool] = max(highest[pool], int(found[1]))
    return highest


def _surplus_in_use(one: Pass, pools: Sequence[Devices]) -> list[str]:
    """StatefulSets of pools that are wanted no more, and still serve."""
    used = _used(one)
    return [
        pool_name(one.key.name, v.pod.pool) for v in one.look.workers if v.pod.pool >= len(pools) and v.name in used
    ]


def _with_patience(manifest: Manifest, name: str, now: Patience) -> Manifest:
    if manifest["kind"] != STATEFUL_SET.name or manifest["metadata"]["name"] != pool_name(name, 0):
        return manifest
    metadata = manifest["metadata"]
    return {
        **manifest,
        "metadata": {**metadata, "annotations": {**metadata.get("annotations", {}), **now.annotations()}},
    }


def _template_of(stateful_set: Manifest) -> str:
    return str(stateful_set["spec"]["template"]["metadata"]["annotations"][TEMPLATE])
