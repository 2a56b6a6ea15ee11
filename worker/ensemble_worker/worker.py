"""The worker: the newest plan it was given, what follows from it, its credentials, and its job of measuring."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from ensemble_contract import planfile
from ensemble_contract.errors import InvalidPlan
from ensemble_contract.keys import Credentials, stamp_of
from ensemble_contract.plan import WorkerPlan
from ensemble_contract.pod import PLAN_FILE
from ensemble_worker import devices, predictor
from ensemble_worker.errors import PlanRefused
from ensemble_worker.exposition import Counters, Figures
from ensemble_worker.instances import Instances
from ensemble_worker.loop import Running
from ensemble_worker.profile_job import ProfileJob
from ensemble_worker.profile_store import ProfileStore
from ensemble_worker.serving import Serving

_LOG = logging.getLogger(__name__)

LOOK_AGAIN_S = 2.0
TOKEN_VARIABLE = "ENSEMBLE_ADMIN_TOKEN"  # noqa: S105  # a variable's name
SHARE_FOR_MEASURING = 0.8
# What a measuring process takes before it has a model, besides libraries that both processes share.
MEASURING_BYTES = 192 << 20


class Worker:
    """Runs the newest plan it was given on its device. `ended` is set when it cannot go on.

    `device_lost` and `cannot_listen` then say why.
    """

    def __init__(self, device: devices.Device, options: argparse.Namespace, credentials: Credentials) -> None:
        self.device = device
        self.overhead_bytes = predictor.overhead_bytes(device)
        self.ended = asyncio.Event()
        self.device_lost = False
        self.cannot_listen: OSError | None = None
        self._name: str = options.name
        self._state_dir: Path | None = options.state_dir
        self._keys_dir: Path | None = options.keys
        self._keys_stamp = stamp_of(options.keys) if options.keys else ()
        self._credentials = credentials
        self._environment_token = os.environ.get(TOKEN_VARIABLE, "")
        self._mirror = planfile.Mirror(options.mirror, lambda plan: plan.row(self._name)) if options.mirror else None
        self._given: Path | None = options.plan
        self._loop = asyncio.get_running_loop()
        self._plan: WorkerPlan | None = None
        self._past: dict[str, Counters] = {}
        self._fitting: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._has_loaded = False
        self._serving = Serving(self._name, options.data, device, lambda: self.generation, self._lose)
        self._instances = Instances(
            device, options.cache_dir, self._serving, self._links_fit, self._lose, self._remember
        )
        store = ProfileStore(self._state_dir / "profiles" if self._state_dir else None, device.device_class)
        self.profiling = ProfileJob(device, options.cache_dir, store, self._spare_bytes)

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the newest plan there is, and look for newer ones and other keys from now on."""
        files = [self._given, self._state_dir / PLAN_FILE if self._state_dir else None]
        plans = [self._own(file) for file in files if file is not None]
        plan = planfile.newest([*plans, self._mirror.look() if self._mirror else None])
        if plan is not None:
            self.adopt(plan)
        self._has_loaded = plan is None
        self._looking = self._loop.create_task(self._look_again_and_again())

    async def close(self) -> bool:
        """Finish the batches that run, say goodbye to gateways; False if a thread is left that cannot be stopped."""
        for task in (self._looking, self._fitting):
            if task is not None:
                task.cancel()
        self._instances.close()
        await self.profiling.end()
        return await self._serving.close() and not self._instances.loading

    # -- plans ----------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The plan's generation; 0 without a plan."""
        return self._plan.generation if self._plan is not None else 0

    def adopt(self, plan: WorkerPlan) -> None:
        """Run a plan, unless it is older than the present one.

        Instances that both plans have go on undisturbed, others finish what they were given, new ones are loaded. The
        same plan once more has those tried again that could not be loaded. Raises InvalidPlan if it is another
        worker's, PlanRefused if it is older or another of the same generation.
        """
        former = self._plan
        if plan.worker != self._name:
            raise InvalidPlan(f"worker: this is {self._name!r}, not {plan.worker!r}: the plan is another worker's")
        if former is not None and plan.generation < former.generation:
            raise PlanRefused(f"generation {plan.generation} is older than {former.generation}")
        if former is not None and plan.generation == former.generation and plan != former:
            raise PlanRefused(f"generation {plan.generation} is another plan already: a new plan needs a newer one")
        self._plan = plan
        if plan != former and self._state_dir is not None:
            planfile.keep(plan, self._state_dir / PLAN_FILE)
        self._past = {name: self._past.get(name, Counters()) for name in {one.member for one in plan.instances}}
        self._instances.follow(plan, again=plan == former)
        self._fit_links()

    def _own(self, file: Path) -> WorkerPlan | None:
        """This worker's plan in a file, if there is one."""
        plan = planfile.read_kept(file, WorkerPlan)
        if plan is not None and plan.worker != self._name:
            _LOG.warning("the plan in %s cannot be used: it is the plan of worker %r", file, plan.worker)
            return None
        return plan

    def _fit_links(self) -> None:
        """Have the links serve the plan with the keys of now, after what is under way."""
        if self._plan is not None and self.device.kind != "none":
            self._fitting = self._loop.create_task(self._fit(self._fitting))

    async def _fit(self, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            await asyncio.wait([former])
        if self._plan is None:
            return
        try:
            await self._serving.fit(self._plan, self._credentials.keys)
        except OSError as error:
            self.cannot_listen = error
            self.ended.set()

    async def _links_fit(self) -> None:
        """Return when the links serve the newest plan."""
        while self._fitting is not None and not self._fitting.done():
            await asyncio.wait([self._fitting])

    # -- what changes beside plans --------------------------------------------------------------------------------

    async def _look_again_and_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            self._look_at_mirror()
            self._look_at_keys()

    def _look_at_mirror(self) -> None:
        plan = self._mirror.look() if self._mirror is not None else None
        if plan is None or plan == self._plan or plan.generation < self.generation:
            return
        try:
            self.adopt(plan)
            _LOG.info("plan %d is taken from its mirror", plan.generation)
        except PlanRefused as error:
            _LOG.warning("the plan's mirror is passed over: %s", error)

    def _look_at_keys(self) -> None:
        folder = self._keys_dir
        if folder is None or (stamp := stamp_of(folder)) == self._keys_stamp:
            return
        self._keys_stamp = stamp
        try:
            found = Credentials.read(folder)
        except ValueError as error:
            _LOG.error("the keys of before stay in use: %s", error)
            return
        if found.keys is None and self._credentials.keys is not None:
            _LOG.error("the keys of before stay in use: %s has none any more; restart to go without encryption", folder)
            found = Credentials(self._credentials.keys, found.token)
        if found.keys != self._credentials.keys:
            _LOG.info("new keys in %s are taken", folder)
        self._credentials = found
        self._fit_links()

    @property
    def token(self) -> str:
        """What admin requests must carry now; empty if anyone may ask."""
        return self._credentials.token or self._environment_token

    # -- what is told ---------------------------------------------------------------------------------------------

    def instance_states(self) -> list[dict[str, Any]]:
        """Every instance of the plan, and those that still leave, with their states."""
        return [placed.as_json() for placed in self._instances.all()]

    @property
    def has_loaded(self) -> bool:
        """Whether the plan that it started with is loaded, as far as it can be; from then on it stays so."""
        self._has_loaded = self._has_loaded or (self._looking is not None and self._instances.settled)
        return self._has_loaded

    def busy_s(self) -> float:
        """For how long the oldest batch that runs now has been running."""
        return self._serving.busy_s()

    def figures(self) -> Figures:
        """What /metrics shows."""
        counters, placed = dict(self._past), self._instances.all()
        memory = dict.fromkeys(counters, 0)
        for one in placed:
            name = one.source.name
            if one.running is not None and name in counters:
                counters[name] = counters[name].plus(one.running)
                memory[name] += one.memory_bytes
        return Figures(
            device=self.device.name,
            device_class=self.device.device_class,
            capacity_bytes=self.device.capacity_bytes,
            overhead_bytes=self.overhead_bytes,
            held_bytes=predictor.memory_in_use(self.device),
            generation=self.generation,
            gateways=self._serving.gateways,
            busy_s=self.busy_s(),
            waiting_batches=self._serving.waiting_batches(),
            counters=counters,
            states=[(one.source.name, one.state) for one in placed],
            memory_bytes=memory,
            profile_running=self.profiling.state == "running",
            profile_points=self.profiling.measured_points,
        )

    # -- what others call back ------------------------------------------------------------------------------------

    def _remember(self, running: Running) -> None:
        """An instance has left: what it has done still counts for its member."""
        if running.member in self._past:
            self._past[running.member] = self._past[running.member].plus(running)

    def _lose(self, cause: str) -> None:
        """The device cannot be used again. Called from any thread."""
        _LOG.error("device %s is lost: %s", self.device.name, cause)
        self.device_lost = True
        self._loop.call_soon_threadsafe(self.ended.set)

    def _spare_bytes(self) -> int | None:
        """What a measuring process may take for its models on a CPU device; on a GPU it sees for itself."""
        if self.device.kind != "cpu":
            return None
        free = min(devices.free_memory_bytes(), self.device.capacity_bytes - predictor.memory_in_use(self.device))
        return int(SHARE_FOR_MEASURING * (free - MEASURING_BYTES))
