"""Lists nodes, pods and published devices for those who wait: at most every 30 s, however many wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.control.errors import ClusterError, Forbidden, LeadershipLost, NotFound
from ensemble_operator.control.inventory import ClusterView, Supply, supply
from ensemble_operator.control.kinds import NODE, POD, RESOURCE_CLAIM, RESOURCE_SLICE, Kind, Manifest
from ensemble_operator.control.world import World
from ensemble_operator.manifests import worker_tolerations

log = logging.getLogger(__name__)

MAX_AGE_S = 30.0
_BOUND = "spec.nodeName!="


class Census:
    """What the cluster has, as of the last list that did not fail. Where the operator may not list it, nothing."""

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._view: ClusterView | None = None
        self._listed_at = -MAX_AGE_S
        self._turn = asyncio.Lock()

    async def supply(self, ensemble: InferenceEnsemble, pool: int) -> Supply | None:
        """The devices that a pool of an ensemble could get; None where nodes cannot be listed."""
        view = await self._current()
        if view is None:
            return None
        devices = ensemble.pools[pool]
        return supply(view, replace(devices, tolerations=worker_tolerations(ensemble, devices)))

    async def _current(self) -> ClusterView | None:
        if self._world.settings.namespace:
            return None
        async with self._turn:
            if self._clock() - self._listed_at >= MAX_AGE_S:
                self._listed_at = self._clock()
                self._view = await self._list()
        return self._view

    async def _list(self) -> ClusterView | None:
        try:
            nodes = [_slim_node(node) for node in await self._world.cluster.list(NODE, newest=False)]
            pods: list[Manifest] = []
            async for page, _ in self._world.cluster.pages(POD, fields=_BOUND):
                pods += [_slim_pod(pod) for pod in page]
        except Forbidden as error:
            log.warning("free devices are not told: %s", error)
            return None
        except LeadershipLost:
            raise
        except ClusterError as error:
            log.warning("free devices are told as they were last seen: %s", error)
            return self._view
        slices = await self._optional(RESOURCE_SLICE)
        claims = [_slim_claim(claim) for claim in await self._optional(RESOURCE_CLAIM)] if slices else []
        return ClusterView(nodes, pods, slices, claims)

    async def _optional(self, kind: Kind) -> list[Manifest]:
        try:
            return list(await self._world.cluster.list(kind, newest=False))
        except (NotFound, Forbidden):
            return []
        except ClusterError:
            log.warning("%s cannot be listed now", kind.plural)
            return []


def _slim_node(node: Manifest) -> Manifest:
    """A node without the list of its images, which is most of it."""
    status = {name: part for name, part in (node.get("status") or {}).items() if name != "images"}
    return {**node, "status": status}


def _slim_claim(claim: Manifest) -> Manifest:
    """A claim's devices."""
    return {"status": {"allocation": (claim.get("status") or {}).get("allocation")}}


def _slim_pod(pod: Manifest) -> Manifest:
    """A pod's node and requests: of a large cluster's pods nothing else can be kept."""
    spec = pod.get("spec") or {}
    kept = {
        part: [{"resources": container.get("resources")} for container in spec.get(part) or ()]
        for part in ("containers", "initContainers")
    }
    return {
        "spec": {"nodeName": spec.get("nodeName"), **kept},
        "status": {"phase": (pod.get("status") or {}).get("phase")},
    }
