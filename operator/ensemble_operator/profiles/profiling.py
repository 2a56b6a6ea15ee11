"""Measures every member of an ensemble at every batch size of its spec on every class of this machine's devices.

The budget is for all of it: loading, batches, co-location. What is cached, declared or quick leaves its time to the
others; each member is measured at its smallest batch size in any case.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ensemble_operator import resource_file
from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.bar import Bar
from ensemble_operator.plans import model_source
from ensemble_operator.profiles.colocating import BUDGET_S, Colocating, fullest_rows
from ensemble_operator.profiles.held import serving_problem
from ensemble_operator.profiles.measurements import Device, Measurement, agreed_tensors, declared
from ensemble_operator.profiles.measuring import Measurer, Task, find_devices
from ensemble_operator.profiles.progress_notes import MemberProgress

Measured = Mapping[tuple[str, str], Measurement]


@dataclass(frozen=True, slots=True)
class Profiled:
    """An ensemble's profiles by (member, device class); `runs` counts those that were not known before.

    `colocation` has the factors of GPU classes; `left_s` is what is left of the budget.
    """

    ensemble: InferenceEnsemble
    devices: tuple[Device, ...]
    measured: Measured
    runs: int
    seconds: float
    colocation: Mapping[str, float] = field(default_factory=dict)
    left_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Effort:
    """Seconds to spend on measuring, all of it together, and where models and profiles are kept.

    With `refresh` what is known is not believed, and replaced.
    """

    budget_s: float
    cache_folder: Path
    refresh: bool = False


async def profile(
    file: Path, cpu_devices: int | None, budget_s: float | None, cache_folder: Path, *, force: bool
) -> Profiled:
    """Profile the ensemble in a file, within its own budget if none is given, with a progress bar.

    With `force` nothing known is believed. Raises what is wrong with the resource.
    """
    clock = asyncio.get_running_loop().time
    started_s = clock()
    ensemble = resource_file.load(file)
    devices = await find_devices(cpu_devices)
    spec = ensemble.spec
    total = len(spec.members) * len({d.device_class for d in devices})
    with Bar(total, f"profiling {ensemble.name}") as bar:
        progress = MemberProgress(bar, spec.batching.sizes, total)
        effort = Effort(spec.planning.profile_budget_s if budget_s is None else budget_s, cache_folder, force)
        measured, colocation = await measured_all(ensemble, devices, effort, progress)
    seconds = clock() - started_s
    left_s = max(0.0, effort.budget_s - seconds)
    return Profiled(ensemble, devices, measured, progress.measured, seconds, colocation, left_s)


async def measured_all(
    ensemble: InferenceEnsemble, devices: Sequence[Device], effort: Effort, progress: MemberProgress
) -> tuple[dict[tuple[str, str], Measurement], dict[str, float]]:
    """The members, as `measured_members`, and in the time that is left the factors, as `colocation_factors`."""
    clock = asyncio.get_running_loop().time
    started_s = clock()
    measured = await measured_members(ensemble, devices, effort, progress)
    rest = replace(effort, budget_s=max(0.0, effort.budget_s - (clock() - started_s)))
    return measured, await colocation_factors(ensemble, devices, measured, rest, progress)


async def measured_members(
    ensemble: InferenceEnsemble,
    devices: Sequence[Device],
    effort: Effort,
    progress: MemberProgress,
) -> dict[tuple[str, str], Measurement]:
    """Every member on every class of device, by (member, class): declared where the resource says so, else measured.

    `progress` is told as each comes. A member that cannot be loaded has no points and
    an error. Raises NotUnderstood if a measuring process does not keep to what was agreed.
    """
    tasks = await _tasks(ensemble)
    by_class: dict[str, list[Device]] = {}
    for device in devices:
        by_class.setdefault(device.device_class, []).append(device)
    pools = [_Pool(alike, len(tasks), effort, progress) for alike in by_class.values()]
    found: dict[tuple[str, str], Measurement] = {}

    async def one(name: str, task: Task, device_class: str, pool: _Pool) -> None:
        found[name, device_class] = said = await pool.measure(name, task)
        progress.finished(name, device_class, said)

    try:
        async with asyncio.TaskGroup() as group:
            for device_class, pool in zip(by_class, pools, strict=True):
                for member in ensemble.spec.members:
                    said = declared(member, device_class)
                    if said.points:
                        found[member.name, device_class] = said
                        pool.settled()
                        progress.finished(member.name, device_class, said)
                    else:
                        group.create_task(one(member.name, tasks[member.name], device_class, pool))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others were cancelled, or say the same
    order = [(member.name, device_class) for member in ensemble.spec.members for device_class in by_class]
    return {key: found[key] for key in order}


async def colocation_factors(
    ensemble: InferenceEnsemble,
    devices: Sequence[Device],
    measured: Measured,
    effort: Effort,
    progress: MemberProgress,
) -> dict[str, float]:
    """The co-location factor of each class of GPU on which worst-fit lets members share a device.

    Measured once per class, where there is time for it, else known. Raises InvalidSpec if it is nowhere said what the
    tensors are.
    """
    if all(device.kind == "cpu" for device in devices):
        return {}
    signatures = {name: found.signature for (name, _), found in measured.items() if found.points}
    try:
        problem = serving_problem(ensemble, devices, measured)
    except InvalidProblem:
        return {}  # nothing could be measured on some class; whoever plans says so
    rows = fullest_rows(problem)
    if not rows:
        return {}
    sources = {name: task.source for name, task in (await _tasks(ensemble)).items()}
    each_s = min(BUDGET_S, effort.budget_s / len(rows))
    colocating = Colocating(devices, effort.cache_folder, progress.report, budget_s=each_s, refresh=effort.refresh)
    return await colocating.factors(rows, sources, agreed_tensors(ensemble, signatures))


class _Pool:
    """The devices of one class: as many measurements at a time, each with its share of the time that is left."""

    def __init__(self, devices: list[Device], tasks: int, effort: Effort, progress: MemberProgress) -> None:
        self._measurer = Measurer(
            devices, effort.cache_folder, progress.report, progress.downloading, refresh=effort.refresh
        )
        self._free = asyncio.Semaphore(len(devices))
        self._devices, self._open = len(devices), tasks
        self._deadline = asyncio.get_running_loop().time() + effort.budget_s

    def settled(self) -> None:
        """One task less will need time."""
        self._open -= 1

    async def measure(self, name: str, task: Task) -> Measurement:
        async with self._free:
            left_s = max(0.0, self._deadline - asyncio.get_running_loop().time())
            budget_s = left_s / math.ceil(self._open / self._devices)
            try:
                found = await self._measurer.measure({name: replace(task, budget_s=budget_s)})
            finally:
                self.settled()
        return next(iter(found.values()))


async def _tasks(ensemble: InferenceEnsemble) -> dict[str, Task]:
    spec = ensemble.spec
    tasks = {}
    for member in spec.members:
        resolved = await asyncio.to_thread(resource_file.with_real_digest, member)
        source, known = model_source(member, resolved), bool(resolved.model.sha256)
        tasks[member.name] = Task(
            source, known, spec.inputs, spec.outputs, spec.batching.sizes, 0.0, load_included=True
        )
    return tasks
