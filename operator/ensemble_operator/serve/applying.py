"""A new resource for an ensemble that serves: prepared as the first was, then walked to step by step.

Nothing is changed unless all of it can be: what is wrong with the resource, its models or the memory is found before
the first step. What fails on the way, such as a model that only its worker cannot load, is walked back.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec

from ensemble_contract.plan import EnsemblePlan
from ensemble_contract.tensors import TensorSpec
from ensemble_operator import resource_file
from ensemble_operator.api import InvalidSpec, Problem
from ensemble_operator.errors import EnsembleError
from ensemble_operator.plans import ensemble_plan, gateway_plan
from ensemble_operator.profiles.held import ROW_CACHE_BYTES
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.rollout.placement import Version
from ensemble_operator.rollout.plans import memory_of, needs_of
from ensemble_operator.serve.change import Change, allocation_of, change_of
from ensemble_operator.serve.deployment import Deployment, PlanNotKept
from ensemble_operator.serve.preparation import ModelUnavailable, Planned, ServeOptions, Teller, plan_for
from ensemble_operator.serve.walk import Goal, NoWay, VersionFailed, walk


class AnotherEnsemble(EnsembleError):
    """The resource is of another name than what serves here."""


class Busy(EnsembleError):
    """Another change is under way."""


class Applier:
    """Changes a deployment, one resource at a time. `planned` is what it serves, or, during a change, served before."""

    def __init__(self, deployment: Deployment, planned: Planned, options: ServeOptions) -> None:
        self.planned = planned
        self._deployment, self._options = deployment, options
        self._needs = dict[tuple[Version, str, int], float](needs_of(planned.problem, planned.sources.values()))
        self._preparing = self._walking = False

    @property
    def walking(self) -> bool:
        """Whether a rollout is under way, which is better not interrupted."""
        return self._walking

    async def apply(self, text: str, source: str, folder: Path, teller: Teller) -> Change:
        """Serve what a resource says, and say what that changed.

        `source` names it in errors; relative paths are taken from `folder`. Raises Busy, AnotherEnsemble, or what is
        wrong with the resource, its models or the memory: then what served goes on.
        """
        if self._preparing or self._walking:
            raise Busy("another change is under way: wait until it is done")
        clock = asyncio.get_running_loop().time
        began_s = clock()
        self._preparing = True
        try:
            planned = await self._prepared(text, source, folder, teller)
            goal = self._goal(planned)
            self._preparing, self._walking = False, True
            steps = await self._walk(goal, teller)
        finally:
            self._preparing = self._walking = False
        before, self.planned = self.planned, planned
        gateway = (await self._deployment.observe()).gateway
        return change_of(before, planned, gateway.url if gateway else "", steps, clock() - began_s)

    async def _prepared(self, text: str, source: str, folder: Path, teller: Teller) -> Planned:
        """What is to be served: planned, and checked against what is."""
        ensemble = resource_file.parse_text(text, source, folder)
        before = self.planned
        if ensemble.name != before.ensemble.name:
            raise AnotherEnsemble(
                f"{source}: is {ensemble.name!r}, and {before.ensemble.name!r} is served here: apply it to its own "
                "server (--socket), or serve it with `ensemble serve`"
            )
        devices = tuple(before.devices.values())
        planned = await plan_for(ensemble, devices, self._left_to_measure(), self._options, teller)
        _check_tensors(before, planned, source)
        for name, cause in planned.unloadable.items():
            same = name in before.unloadable and before.sources[name].digest == planned.sources[name].digest
            if not same:
                raise ModelUnavailable(f"{source}: member {name!r} ({planned.sources[name].uri}): {cause}")
        return planned

    def _left_to_measure(self) -> tuple[Device, ...]:
        """The devices, with what they have left beside what serves: measuring must not harm it."""
        taken = allocation_of(self.planned).used_bytes
        return tuple(
            msgspec.structs.replace(device, capacity_bytes=max(1, device.capacity_bytes - int(taken[name])))
            for name, device in self.planned.devices.items()
        )

    def _goal(self, planned: Planned) -> Goal:
        self._needs |= needs_of(planned.problem, planned.sources.values())
        addresses = {worker.name: worker.address for worker in self._deployment.plan.gateway.workers}
        plan = plan_to_serve(planned, addresses, generation=0)
        # The gateway would wait to switch to a member that no worker can hold: requests wait for it from the start.
        gateway = msgspec.structs.replace(plan.gateway, hold=bool(planned.unloadable))
        plan = msgspec.structs.replace(plan, gateway=gateway)
        return Goal(plan, memory_of(planned.problem, self._needs), planned.ensemble.spec.rollout == "Pause")

    async def _walk(self, goal: Goal, teller: Teller) -> int:
        """The steps taken. What fails on the way is walked back, and raised."""
        former = self._deployment.plan
        try:
            return await walk(self._deployment, goal, teller.note)
        except (NoWay, VersionFailed, PlanNotKept) as error:
            if self._deployment.plan is former:
                raise
            teller.warn(f"{error}; going back")
            try:
                await walk(self._deployment, replace(goal, plan=former), teller.note)
            except (NoWay, VersionFailed, PlanNotKept) as second:
                raise type(error)(
                    f"{error}\nand there is no way back: {second}; what serves now is a part of both: "
                    "`ensemble apply` a resource that fits"
                ) from second
            raise type(error)(f"{error}; what served before serves again") from error


def plan_to_serve(planned: Planned, addresses: dict[str, str], generation: int) -> EnsemblePlan:
    """The whole plan for workers at these addresses."""
    gateway = gateway_plan(planned.ensemble, generation, planned.sources, planned.tensors, addresses)
    return ensemble_plan(gateway, planned.matrix, planned.sources, ROW_CACHE_BYTES)


def _check_tensors(before: Planned, after: Planned, source: str) -> None:
    """Refuse what clients would notice as another model.

    Raises InvalidSpec.
    """
    pairs = (
        ("input", before.tensors.inputs, after.tensors.inputs),
        ("output", before.tensors.outputs, after.tensors.outputs),
    )
    problems = [
        Problem(
            f"spec.{field}", f"cannot be changed while it serves, was {_show(old)}, got {_show(new)}: serve it anew"
        )
        for field, old, new in pairs
        if old != new
    ]
    if problems:
        raise InvalidSpec(problems, source)


def _show(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{t.name} {t.datatype} {list(t.shape)}" for t in tensors)
