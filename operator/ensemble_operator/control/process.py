"""The operator's process: leads, follows the cluster, and works on one ensemble after the other.

In this order: health, the lease, what is there, then the work. At the end the other way round, so that whoever leads
next finds nothing under way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.ensembles import Ensembles
from ensemble_operator.control.errors import LeadershipLost, Unavailable
from ensemble_operator.control.handlers import EnsembleWatch
from ensemble_operator.control.health import Doors
from ensemble_operator.control.kinds import ENSEMBLE, Key, Manifest, kind_of
from ensemble_operator.control.lease import Effects, Leadership, end_process
from ensemble_operator.control.logs import current_ensemble
from ensemble_operator.control.metrics import Instruments, Sources
from ensemble_operator.control.settings import Settings
from ensemble_operator.control.store import Store
from ensemble_operator.control.watches import Watches
from ensemble_operator.control.workqueue import WorkQueue
from ensemble_operator.control.world import Outcome, Reconciles, World
from ensemble_operator.errors import EnsembleError

log = logging.getLogger(__name__)

# Of a pod's 30 s: what is under way may end, then the lease is given up.
FINISH_S = 10.0
AWAY_MIN_S, AWAY_MAX_S = 1.0, 4.0
SPREAD = 0.2

Build = Callable[[World], Reconciles]


class Operator:
    """One process that may come to lead. `build` makes what reconciles. Made in the loop that it runs in.

    `lost` is called when another one leads, or the loop is stuck: it must end all that goes on here.
    """

    def __init__(
        self, cluster: Cluster, settings: Settings, build: Build, lost: Callable[[str], None] = end_process
    ) -> None:
        namespace = settings.namespace or None
        self._cluster, self._settings = cluster, settings
        self._store, self._instruments = Store(), Instruments()
        self._queue: WorkQueue[Key] = WorkQueue(self._work, settings.workers, _around_one)
        self._ensembles = Ensembles(
            cluster, self._store, self._queue.add, namespace, on_missed=lambda: self._kopf.restart()
        )
        self._watches = Watches(
            cluster, self._store, self._queue.add, namespace=namespace, on_doubt=self._ensembles.doubt
        )
        self._kopf = EnsembleWatch(self._ensembles.seen, cluster.access, self._ensembles.list, namespace)
        self._leadership = Leadership(
            cluster,
            settings.pod_namespace,
            settings.pod_name or f"{socket.gethostname()}-{os.getpid()}",
            Effects(suspend=self._queue.pause, resume=self._queue.resume, lost=lost),
            name=settings.lease_name,
        )
        cluster.guard = self._leadership.require
        cluster.on_written = self._written
        self._reconciler = build(World(cluster, self._store, settings, self._instruments))

    async def run(self, stop: asyncio.Event, host: str | None) -> None:
        """Lead, work, and end when `stop` is set.

        Raises EnsembleError if it cannot start.
        """
        doors = Doors(self._sick, self._unready, self._exposition)
        try:
            ports = await doors.open(host, self._settings.health_port, self._settings.metrics_port)
            log.info("health on port %d, metrics on port %d", *ports)
            await _until_one_ends(stop.wait(), self._leadership.acquire())
            if not stop.is_set():
                await self._reign(stop)
        finally:
            await self._reconciler.close()
            await doors.close()

    async def _reign(self, stop: asyncio.Event) -> None:
        try:
            await _until_one_ends(self._leadership.renew(), self._watches.run(), self._serve(stop))
        finally:
            await self._leadership.release()
            await self._kopf.stop()

    async def _serve(self, stop: asyncio.Event) -> None:
        await _until_one_ends(stop.wait(), self._look_around())
        if stop.is_set():
            return
        self._kopf.start()
        log.info("serving %d InferenceEnsembles", len(self._store.keys()))
        await _until_one_ends(self._ensembles.run(), self._queue.run(), self._finish(stop))

    async def _look_around(self) -> None:
        """Know all that is there before anything is decided."""
        await self._ensembles.list()
        await self._watches.synced()

    async def _finish(self, stop: asyncio.Event) -> None:
        await stop.wait()
        log.info("asked to stop: what is under way may end within %g s", FINISH_S)
        if not await self._queue.close(FINISH_S):
            log.warning("some reconciles did not end in time and were cancelled")

    async def _work(self, key: Key) -> None:
        """One reconcile; whatever it raises is told, counted and tried again."""
        current_ensemble.set(str(key))
        await self._ensembles.certain()
        began, result, reason = time.monotonic(), "failed", ""
        try:
            outcome = await self._reconciler.reconcile(key)
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        except (Unavailable, LeadershipLost) as error:
            # Not this ensemble's fault, and soon over: no growing delays.
            reason = error.reason
            log.info("tried again in a moment: %s", error)
            self._queue.add_after(key, random.uniform(AWAY_MIN_S, AWAY_MAX_S))  # noqa: S311
        except EnsembleError as error:
            reason = getattr(error, "reason", type(error).__name__)
            log.warning("tried again in %.1f s: %s", self._queue.add_rate_limited(key), error)
        except Exception as error:
            # A defect of ours on one ensemble must not stop the others.
            reason = type(error).__name__
            log.exception("unexpected; tried again in %.1f s", self._queue.add_rate_limited(key))
        else:
            result = "done"
            self._queue.forget(key)
            self._look_again(key, outcome)
        finally:
            self._instruments.reconciled(result, time.monotonic() - began, reason)

    def _look_again(self, key: Key, outcome: Outcome) -> None:
        if self._store.ensemble(key) is None:
            self._queue.drop(key)
            return
        resync_s = self._settings.resync_s * _around_one()
        soon_s = outcome.requeue_after_s
        self._queue.add_after(key, resync_s if soon_s is None else min(resync_s, soon_s))

    def _written(self, found: Manifest) -> None:
        """What the API server answered to a change of ours is known at once."""
        touched = self._store.note_written(found)
        if touched is not None and kind_of(found) == ENSEMBLE:
            # Somebody edited the resource just before we wrote its status.
            self._queue.add(touched)

    def _sick(self) -> list[str]:
        """What only a restart helps against."""
        found = [f"the watch of {plural} is stuck" for plural in self._watches.stuck()]
        if self._kopf.ended:
            found.append("the thread that watches InferenceEnsembles has ended")
        return found

    def _unready(self) -> list[str]:
        """What somebody should look at. A standby is ready."""
        return self._watches.problems() if self._leadership.leads else []

    def _exposition(self) -> str:
        backlog = self._queue.backlog
        return self._instruments.exposition(
            Sources(
                requests=lambda: self._cluster.request_counts,
                relists=lambda: self._watches.relists,
                ensembles=self._store.ensembles,
                queue_depth=lambda: backlog.depth,
                queue_oldest_s=lambda: backlog.oldest_wait_s(asyncio.get_running_loop().time()),
                leads=lambda: self._leadership.leads,
            )
        )


async def operate(settings: Settings, kubeconfig: Path | None, context: str | None, build: Build) -> None:
    """Run the operator until SIGTERM or SIGINT: in a pod, or outside of one with a kubeconfig.

    Raises EnsembleError if it cannot start.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    cluster = await Cluster.connect(kubeconfig, context, settings.pod_name or socket.gethostname())
    try:
        # Outside of a pod only this machine asks for metrics.
        await Operator(cluster, settings, build).run(stop, "127.0.0.1" if kubeconfig else None)
    finally:
        await cluster.close()


async def _until_one_ends(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Run jobs side by side until one ends, then end the others; raises what one of them raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


def _around_one() -> float:
    return random.uniform(1 - SPREAD, 1 + SPREAD)  # noqa: S311
