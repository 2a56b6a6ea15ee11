"""Leadership: of several operators one acts. A coordination.k8s.io Lease, taken before anything is watched or changed.

`Election` decides and is pure. `Leadership` asks the API server. A leader that cannot renew in time (the API server is
away) is suspended before its lease ends, and goes on if the lease is still its own when the server is back. One that
lost the lease to another, or whose event loop is stuck, ends its process.

Operators of several releases in one namespace each have a lease of their own. One that is named like its Deployment
waits first for pods of that Deployment that lead by the default name: with both leases held, both would act.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import ClusterError, Conflict, LeadershipLost, NotFound
from ensemble_operator.control.kinds import LEASE, Manifest
from ensemble_operator.control.settings import LEASE_NAME
from ensemble_operator.control.times import micro_time

log = logging.getLogger(__name__)

EXIT_LOST = 70


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a lease lasts, how long its holder acts without a renewal, and how often it is renewed.

    Between the two the holder's last requests come to an end; a loop that is stuck has `grace_s` of it.
    """

    duration_s: float = 15.0
    renew_within_s: float = 10.0
    retry_s: float = 2.0
    grace_s: float = 2.0


class Election:
    """Whether the lease may be taken. Times are of this process's clock: those in the lease are another machine's.

    A holder has lost it when the lease has not changed for its duration, as seen from here.
    """

    def __init__(self, identity: str, terms: Terms) -> None:
        self.identity = identity
        self._terms = terms
        self._seen: tuple[object, ...] | None = None
        self._seen_s = 0.0

    def wait_s(self, lease: Manifest | None, now: float) -> float:
        """How long the holder may still keep the lease, as it was just read; 0: it may be taken."""
        if lease is None:
            return 0.0
        spec = lease.get("spec") or {}
        seen = (spec.get("holderIdentity"), spec.get("renewTime"), lease["metadata"].get("resourceVersion"))
        if seen != self._seen:
            self._seen, self._seen_s = seen, now
        # Our own from before a crash: a process of this identity is there once.
        if spec.get("holderIdentity") in (None, "", self.identity):
            return 0.0
        duration_s = float(spec.get("leaseDurationSeconds") or self._terms.duration_s)
        return max(0.0, self._seen_s + duration_s - now)

    def written(self, lease: Manifest | None, namespace: str, name: str, clock: float, *, held: bool) -> Manifest:
        """The lease as it is to be written: held by us, or given up. `clock` is the wall clock's time in seconds."""
        spec = dict((lease or {}).get("spec") or {})
        stamp = micro_time(clock)
        if held and spec.get("holderIdentity") != self.identity:
            spec["acquireTime"] = stamp
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + (lease is not None)
        spec["holderIdentity"] = self.identity if held else ""
        spec["renewTime"] = stamp
        spec["leaseDurationSeconds"] = max(1, round(self._terms.duration_s)) if held else 1
        metadata = (lease or {}).get("metadata") or {"name": name, "namespace": namespace}
        return {"apiVersion": LEASE.api_version, "kind": LEASE.name, "metadata": metadata, "spec": spec}


@dataclass(frozen=True, slots=True)
class Effects:
    """What happens to the work when leadership changes. `lost` must end this process: another one acts from now on."""

    suspend: Callable[[], None] = lambda: None
    resume: Callable[[], None] = lambda: None
    lost: Callable[[str], None] = lambda why: end_process(why)


class Leadership:
    """Takes, renews and gives up a lease."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        identity: str,
        effects: Effects | None = None,
        terms: Terms | None = None,
        name: str = LEASE_NAME,
    ) -> None:
        self._cluster = cluster
        self._namespace, self._name = namespace, name
        self._terms = terms or Terms()
        self._election = Election(identity, self._terms)
        self._default = Election(identity, self._terms)
        self._effects = effects or Effects()
        self._lease: Manifest | None = None
        self._renewed_s: float | None = None
        self._suspended = False
        self._ended = threading.Event()

    @property
    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._renewed_s is not None and time.monotonic() - self._renewed_s < self._terms.renew_within_s

    def require(self) -> None:
        """Raise LeadershipLost unless this process may act now."""
        if not self.leads:
            raise LeadershipLost(f"{self._election.identity} does not lead: nothing may be changed")

    async def acquire(self) -> None:
        """Wait until this process leads. Errors of the API server are logged once each and waited out."""
        problem = ""
        while True:
            pause_s = self._terms.retry_s
            try:
                wait_s = await self._default_wait_s() or await self._try()
                if wait_s == 0:
                    break
                pause_s, problem = min(wait_s, pause_s), ""
            except ClusterError as error:
                if str(error) != problem:
                    log.warning("cannot take the lease %s/%s, and try again: %s", self._namespace, self._name, error)
                problem = str(error)
            await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))  # noqa: S311
        log.info("%s leads", self._election.identity)
        threading.Thread(target=self._watchdog, name="leadership", daemon=True).start()

    async def renew(self) -> None:
        """Renew until cancelled, or lost to another."""
        told = False
        while not self._ended.is_set():
            await asyncio.sleep(self._terms.retry_s)
            try:
                async with asyncio.timeout(self._left_s()):
                    if await self._try():
                        self._lose("another process holds the lease")
                        return
                told = False
            except (ClusterError, TimeoutError) as error:
                if not told:
                    why = str(error) or "no answer in time"
                    log.warning("cannot renew the lease %s/%s, and try again: %s", self._namespace, self._name, why)
                told = True
            self._settle()

    async def release(self) -> None:
        """Give the lease up, so that the next leader need not wait for its end."""
        self._ended.set()
        if not self.leads:
            return
        self._renewed_s = None
        lease = self._election.written(self._lease, self._namespace, self._name, time.time(), held=False)
        try:
            await self._cluster.write_lease(lease, self._terms.retry_s)
        except ClusterError as error:
            log.warning("cannot give up the lease; the next leader waits for its end: %s", error)

    async def _try(self) -> float:
        """Take or renew; 0 if the lease is ours now, otherwise for how long it is another's at most."""
        asked_s = time.monotonic()
        if self._renewed_s is None:
            self._lease = await self._read()
        for _ in range(2):
            wait_s = self._election.wait_s(self._lease, time.monotonic())
            if wait_s > 0:
                return wait_s
            wanted = self._election.written(self._lease, self._namespace, self._name, time.time(), held=True)
            try:
                self._lease = await self._cluster.write_lease(wanted, self._terms.renew_within_s / 2)
            except (Conflict, NotFound):
                # Somebody wrote or deleted it in between, or the answer to our last write was lost.
                self._lease = await self._read()
                continue
            # From before the request: others cannot have begun to count earlier.
            self._renewed_s = asked_s
            return 0.0
        raise Conflict(f"the lease {self._namespace}/{self._name} changes all the time")

    async def _default_wait_s(self) -> float:
        """How long a pod of our Deployment may still lead by the default name."""
        if self._name == LEASE_NAME:
            return 0.0
        lease = await self._read(LEASE_NAME)
        holder = str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")
        return self._default.wait_s(lease, time.monotonic()) if is_pod_of(self._name, holder) else 0.0

    async def _read(self, name: str = "") -> Manifest | None:
        return await self._cluster.read_lease(self._namespace, name or self._name, self._terms.renew_within_s / 2)

    def _left_s(self) -> float:
        """How long an attempt may take: not past the moment when a leader must be suspended."""
        if self._suspended or self._renewed_s is None:
            return self._terms.renew_within_s
        return max(0.0, self._renewed_s + self._terms.renew_within_s - time.monotonic())

    def _settle(self) -> None:
        if not self.leads and not self._suspended:
            log.error(
                "the lease could not be renewed for %g s: nothing is done until it is", self._terms.renew_within_s
            )
            self._suspended = True
            self._effects.suspend()
        elif self.leads and self._suspended:
            log.info("the lease is renewed: work goes on")
            self._suspended = False
            self._effects.resume()

    def _lose(self, why: str) -> None:
        self._renewed_s = None
        if not self._ended.is_set():
            self._ended.set()
            self._effects.lost(why)

    def _watchdog(self) -> None:
        """A thread: the event loop, which would suspend the work, may be what is stuck."""
        limit_s = self._terms.renew_within_s + self._terms.grace_s
        while not self._ended.wait(self._terms.grace_s / 4):
            renewed_s = self._renewed_s
            if renewed_s is not None and not self._suspended and time.monotonic() - renewed_s > limit_s:
                self._lose(f"the event loop is stuck; the lease was not renewed for {limit_s:g} s")


def is_pod_of(deployment: str, pod: str) -> bool:
    """Whether a pod's name is one that the pods of this Deployment get."""
    return re.fullmatch(rf"{re.escape(deployment)}-[a-z0-9]+-[a-z0-9]{{5}}", pod) is not None


def end_process(why: str) -> None:
    """End at once: nothing that is under way may go on beside the next leader."""
    log.critical("leadership is lost: %s; this process ends", why)
    with contextlib.suppress(Exception):
        logging.shutdown()
    os._exit(EXIT_LOST)
