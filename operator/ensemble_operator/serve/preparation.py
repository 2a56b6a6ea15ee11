"""What `ensemble serve` decides before it starts or changes anything: resource, members measured, matrix planned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ensemble_contract.plan import ModelSource
from ensemble_operator import resource_file
from ensemble_operator.addresses import check_address
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.planner import plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.api import InferenceEnsemble, cluster_only
from ensemble_operator.errors import EnsembleError
from ensemble_operator.planning.settings import options_of
from ensemble_operator.plans import Tensors, model_source
from ensemble_operator.profiles.colocating import known_factors
from ensemble_operator.profiles.held import ROW_CACHE_BYTES, serving_problem
from ensemble_operator.profiles.measurements import (
    Device,
    Measurement,
    agreed_tensors,
    declared,
    sizes_to_measure,
)
from ensemble_operator.profiles.measuring import Measurer, Task, find_devices
from ensemble_operator.profiles.serving_cost import with_known_cost
from ensemble_operator.serve.downloads import Downloads

# Of each member, once it is loaded, for all batch sizes together.
MEASURE_BUDGET_S = 2.5


class ModelUnavailable(EnsembleError):
    """Fewer members can be loaded than the quorum needs; the message names each with its URI and the cause."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says. `runtime_base` is where the private folder shall lie, if anywhere in particular.

    `socket` is where `ensemble apply` finds this server, if nowhere of its name.
    """

    file: Path
    host: str
    port: int
    cpu_devices: int | None
    cache_folder: Path
    runtime_base: str | None
    link: str
    encryption: str
    log_level: str
    socket: Path | None = None


class Teller(Protocol):
    """Takes what a person should know while something is prepared or changed."""

    def note(self, text: str) -> None:
        """A step, said while it is taken."""

    def warn(self, text: str) -> None:
        """Something that a person should know."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything that is decided before a process starts or changes. `unloadable` has the cause by member."""

    ensemble: InferenceEnsemble
    devices: Mapping[str, Device]
    sources: Mapping[str, ModelSource]
    tensors: Tensors
    problem: Problem
    matrix: Matrix
    predicted_rows_per_s: float
    bound_rows_per_s: float
    unloadable: Mapping[str, str]

    @property
    def placed(self) -> dict[str, tuple[str, ...]]:
        """The devices of every placed member."""
        return {name: tuple(self.matrix.column(index)) for index, name in enumerate(self.matrix.members)}


async def prepare(options: ServeOptions, teller: Teller) -> Planned:
    """Read, find devices, measure, plan.

    Raises what is wrong, of the resource, the address, the models or the memory.
    """
    ensemble = resource_file.load(options.file)
    await asyncio.to_thread(check_address, options.host, options.port)
    devices = await find_devices(options.cpu_devices)
    teller.note(f"{len(devices)} devices: " + ", ".join(f"{d.name} ({d.device_class})" for d in devices))
    planned = await plan_for(ensemble, devices, devices, options, teller)
    for name, cause in planned.unloadable.items():
        teller.warn(f"served without {name}: {cause}")
    return planned


async def plan_for(
    ensemble: InferenceEnsemble,
    devices: Sequence[Device],
    measured_on: Sequence[Device],
    options: ServeOptions,
    teller: Teller,
) -> Planned:
    """Measure what is not known of the members, and plan them for the devices.

    `measured_on` are the same devices with what measuring may take of them. Raises what is wrong, of the resource, the
    models or the memory.
    """
    _say_what_is_set_aside(ensemble, teller)
    labels = await asyncio.to_thread(resource_file.read_labels, ensemble)
    members = ensemble.spec.members
    resolved = {m.name: await asyncio.to_thread(resource_file.with_real_digest, m) for m in members}
    sources = {m.name: model_source(m, resolved[m.name]) for m in members}
    known = {name: bool(member.model.sha256) for name, member in resolved.items()}
    measured = await _measure(ensemble, measured_on, sources, known, options, teller)
    unloadable = _unloadable(ensemble, measured, sources)
    signatures = {name: m.signature for (name, _), m in measured.items() if m.points}
    inputs, outputs = agreed_tensors(ensemble, signatures)
    served = with_known_cost(measured, devices, (inputs, outputs), options.cache_folder)
    cache, factors = ROW_CACHE_BYTES if options.link == "zeromq" else 0, known_factors(devices, options.cache_folder)
    problem = serving_problem(ensemble, devices, served, row_cache_bytes=cache, colocation=factors)
    # Every member on every device, where memory allows: the gateway then runs members side by side for one client, and
    # spreads the rows of many.
    wanted = options_of(ensemble.spec.planning, copies=len(devices))
    found = await asyncio.to_thread(plan, problem, wanted, clock=time.monotonic)
    if unmeasured := _shared_unmeasured(problem, found.matrix):
        teller.note(
            f"planned as if members shared {', '.join(unmeasured)} perfectly: `ensemble profile` measures how they do"
        )
    tensors = Tensors(inputs, outputs, labels)
    by_name = {d.name: d for d in devices}
    rates = (found.predicted_rows_per_s, found.bound_rows_per_s)
    return Planned(ensemble, by_name, sources, tensors, problem, found.matrix, *rates, unloadable)


async def _measure(
    ensemble: InferenceEnsemble,
    devices: Sequence[Device],
    sources: Mapping[str, ModelSource],
    known: Mapping[str, bool],
    options: ServeOptions,
    teller: Teller,
) -> dict[tuple[str, str], Measurement]:
    """Every member on every class of device: declared where the resource says all of it, else measured."""
    spec = ensemble.spec
    classes = {d.device_class for d in devices}
    found = {(m.name, c): declared(m, c) for m in spec.members for c in classes}
    tells_tensors = bool(spec.inputs and spec.outputs)
    open_members = [m for m in spec.members if not (tells_tensors and all(found[m.name, c].points for c in classes))]
    sizes = sizes_to_measure(spec.batching.sizes)
    tasks = {
        m.name: Task(sources[m.name], known[m.name], spec.inputs, spec.outputs, sizes, MEASURE_BUDGET_S)
        for m in open_members
    }
    with Downloads(teller.note) as downloads:
        measurer = Measurer(devices, options.cache_folder, downloads.note, downloads.advance)
        return {**found, **await measurer.measure(tasks)}


def _unloadable(
    ensemble: InferenceEnsemble, measured: Mapping[tuple[str, str], Measurement], sources: Mapping[str, ModelSource]
) -> dict[str, str]:
    """Members that no device can load, with the cause.

    Raises ModelUnavailable if the rest is no quorum.
    """
    loadable = {name for (name, _), m in measured.items() if m.points}
    causes = {name: m.error for (name, _), m in measured.items() if name not in loadable}
    check_quorum(ensemble, causes, sources)
    return causes


def check_quorum(ensemble: InferenceEnsemble, causes: Mapping[str, str], sources: Mapping[str, ModelSource]) -> None:
    """Check that enough members are left without those that have failed.

    Raises ModelUnavailable, with the cause of each.
    """
    members, quorum = ensemble.spec.members, ensemble.spec.combine.quorum
    able = len(members) - len(causes)
    if able >= max(1, quorum):
        return
    lines = []
    for name, cause in causes.items():
        known = cause if sources[name].uri in cause else f"member {name!r} ({sources[name].uri}): {cause}"
        lines.append(known)
    lines.append(f"{able} of {len(members)} members can be loaded, and spec.combine.quorum needs {quorum}")
    raise ModelUnavailable("\n".join(lines))


def _shared_unmeasured(problem: Problem, matrix: Matrix) -> list[str]:
    """Classes of GPU on which members share a device, and whose co-location factor nobody has measured."""
    shared = (d for index, d in enumerate(problem.devices) if d.kind == "cuda" and len(matrix.row(index)) > 1)
    return [name for name in dict.fromkeys(d.device_class for d in shared) if name not in problem.colocation]


def _say_what_is_set_aside(ensemble: InferenceEnsemble, teller: Teller) -> None:
    if aside := cluster_only(ensemble):
        teller.note(f"set aside, they describe a cluster: {', '.join(aside)}")
