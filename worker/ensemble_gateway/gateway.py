"""The gateway as a whole: which plan it serves, and how a newer one takes over. The sockets of its ports are elsewhere.

A newer plan gets a pipeline of its own on the same engine. Requests go to it as soon as all its members are live on its
workers (with `hold`, at once), and those of the former plan are finished as they were admitted: no answer mixes two
versions of a member. Only a plan with other tensors or another store needs another engine.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Callable

import zmq

from ensemble_contract.keys import KeyFiles
from ensemble_contract.plan import GatewayPlan, WorkerAddress
from ensemble_gateway.engine import Engine
from ensemble_gateway.links import Link, LinkOwner
from ensemble_gateway.links.memory import SharedMemory
from ensemble_gateway.links.resolver import Resolver
from ensemble_gateway.links.shared import SharedLink
from ensemble_gateway.links.zeromq import ZeroMQLink
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.request import RequestError
from ensemble_gateway.rowstore import RowStore

_LOG = logging.getLogger(__name__)

NO_PLAN_RETRY_S = 2


class StalePlan(Exception):
    """A plan that is not newer than the one adopted; the message names both generations."""


class Gateway:
    """What is served now, and what comes next. `adopted` is called with each plan that is taken."""

    def __init__(self, keys: KeyFiles | None = None, adopted: Callable[[GatewayPlan], None] = lambda _: None) -> None:
        self.keys = keys
        self.url = ""
        self.draining = False
        # The newest plan adopted, which may not be served yet.
        self.newest: GatewayPlan | None = None
        self.pipeline_or_none: Pipeline | None = None
        self._adopted = adopted
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._resolver = Resolver()
        self._engines: list[Engine] = []
        self._following: Pipeline | None = None
        self._retiring: list[Pipeline] = []

    @property
    def pipeline(self) -> Pipeline:
        """What requests go through.

        Raises RequestError (503) before the first plan.
        """
        if self.pipeline_or_none is None:
            raise RequestError(
                503, "this gateway has no plan yet: it serves when its first plan comes", NO_PLAN_RETRY_S
            )
        return self.pipeline_or_none

    @property
    def ready(self) -> bool:
        """Whether requests shall come here; stays so until it drains."""
        return self.pipeline_or_none is not None and self.pipeline_or_none.ready

    @property
    def retiring(self) -> int:
        """Changes of plan that are under way, and former plans with requests in flight."""
        waiting = self.newest is not None and self.pipeline_or_none is not None and not self._serves(self.newest)
        return waiting + len(self._retiring)

    def adopt(self, plan: GatewayPlan) -> None:
        """Serve a plan as soon as it can be; nothing happens if it is the newest already.

        Raises StalePlan if it is older, or another one of the same generation.
        """
        newest = self.newest
        if newest is not None:
            if plan == newest:
                return
            if plan.generation < newest.generation:
                raise StalePlan(f"generation {plan.generation} is older than {newest.generation}")
            if plan.generation == newest.generation:
                raise StalePlan(
                    f"generation {plan.generation} is another plan here: a changed plan needs a higher generation"
                )
        self.newest = plan
        self._adopted(plan)
        if self._following is not None:
            # Replaced before it was served.
            self._end(self._following)
            self._following = None
        self._go_on()

    def drain(self) -> None:
        """Say that no new requests shall come."""
        self.draining = True
        if self.pipeline_or_none is not None:
            self.pipeline_or_none.draining = True

    def close(self) -> None:
        """Leave the workers."""
        for engine in self._engines:
            engine.close()
        self._context.destroy(linger=0)

    # -- changes of plan ------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do what can be done now of a change; called again whenever workers, plans or requests in flight have."""
        for former in [pipeline for pipeline in self._retiring if not pipeline.in_flight]:
            self._retiring.remove(former)
            self._end(former)
        plan = self.newest
        if plan is not None and not self._serves(plan):
            if self._following is None:
                self._following = self._open(plan)
            if self._following is not None and self._may_follow(self._following):
                self._switch(self._following)
        self._share_memory()

    def _serves(self, plan: GatewayPlan) -> bool:
        return self.pipeline_or_none is not None and self.pipeline_or_none.plan is plan

    def _open(self, plan: GatewayPlan) -> Pipeline | None:
        """A pipeline for a plan; None while former plans with requests in flight have all columns."""
        former = self.pipeline_or_none
        if former is None or not former.engine.fits(plan):
            engine = Engine(plan, self._make_link, self._go_on)
            self._engines.append(engine)
            return engine.open(plan, former)
        return former.engine.open(plan, former) if former.engine.has_room_for(plan) else None

    def _may_follow(self, following: Pipeline) -> bool:
        """Whether requests had better go to the newer plan now."""
        former = self.pipeline_or_none
        if former is None or following.plan.hold or following.whole:
            return True
        return following.answerable and not former.answerable

    def _switch(self, following: Pipeline) -> None:
        former, self.pipeline_or_none, self._following = self.pipeline_or_none, following, None
        following.draining = self.draining
        following.engine.prefer(following, waiting=following.plan.hold)
        if former is not None:
            _LOG.info("plan %d follows plan %d", following.plan.generation, former.plan.generation)
            self._retiring.append(former)
            former.leave()

    def _end(self, pipeline: Pipeline) -> None:
        """Nothing goes through a pipeline any more; its engine ends with the last one that it has."""
        engine = pipeline.engine
        engine.end(pipeline)
        if not engine.pipelines:
            self._engines.remove(engine)
            engine.close()

    def _share_memory(self) -> None:
        """While two engines have rows, those of the former count against the store of the present one."""
        if self.pipeline_or_none is not None:
            present = self.pipeline_or_none.engine
            present.share_store(sum(engine.used_bytes for engine in self._engines if engine is not present))

    def _make_link(self, worker: WorkerAddress, memory: SharedMemory, store: RowStore, owner: LinkOwner) -> Link:
        scheme, _, path = worker.address.partition(":")
        if scheme == "unix":
            return SharedLink(worker.name, path, memory, store, self._name, owner)
        return ZeroMQLink(worker, store, self._name, owner, self._context, self._resolver, lambda: self.keys)
