"""What `ensemble plan` decides: the question, from files or from this machine, and how hard to look for the answer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble_operator import resource_file
from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.api import InferenceEnsemble, Planning
from ensemble_operator.bar import Bar
from ensemble_operator.planning import cluster_file
from ensemble_operator.planning.cluster_file import Document
from ensemble_operator.planning.settings import options_of
from ensemble_operator.profiles.colocating import known_factors
from ensemble_operator.profiles.held import held_bytes, serving_problem
from ensemble_operator.profiles.measurements import UNMEASURED_OVERHEAD_BYTES, agreed_tensors
from ensemble_operator.profiles.measuring import find_devices
from ensemble_operator.profiles.profiling import Effort, measured_all
from ensemble_operator.profiles.progress_notes import MemberProgress
from ensemble_operator.profiles.serving_cost import with_known_cost
from ensemble_operator.serve.preparation import ModelUnavailable


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the question comes from. `inventory` and `profiles` are files of elsewhere, if given."""

    file: Path
    inventory: Path | None
    profiles: Path | None
    cpu_devices: int | None
    cache_folder: Path


@dataclass(frozen=True, slots=True)
class Question:
    """What is planned: one problem or a series of them, each with the words for its devices.

    `here`: the devices are this machine's, and the profiles its own.
    """

    name: str
    source: str
    problems: tuple[tuple[str, Problem], ...]
    planning: Planning | None
    here: bool = False


async def question(sources: Sources) -> Question:
    """Read the files; find and measure what they leave open.

    Raises ResourceUnreadable, InvalidSpec or InvalidProblem for what is wrong in a file, and ModelUnavailable if a
    member can be measured on no device.
    """
    inventory = cluster_file.section(sources.inventory, "devices") if sources.inventory else None
    profiles = cluster_file.section(sources.profiles, "profiles") if sources.profiles else None
    document = _described_document(sources.file)
    if document is not None:
        return _described(document, inventory, profiles, sources, None)
    ensemble = resource_file.load(sources.file)
    if inventory is None and profiles is None:
        return await _measured(ensemble, sources)
    if inventory is None:
        inventory = await _machine(ensemble, sources, profiles)
    base = cluster_file.ensemble_document(ensemble, str(sources.file), cluster_file.classes_of(inventory))
    return _described(base, inventory, profiles, sources, ensemble.spec.planning)


def plan_options(planning: Planning | None, args: argparse.Namespace) -> PlanOptions:
    """The resource's fields, and the command line's over them.

    Raises InvalidProblem if they do not go together.
    """
    found = PlanOptions() if planning is None else options_of(planning)
    wanted: dict[str, Any] = {
        "objective": args.objective,
        "target_rows_per_s": args.target_throughput,
        "strategy": args.strategy,
        "seed": args.seed,
        "time_limit_s": args.time_limit,
    }
    return replace(found, **{name: value for name, value in wanted.items() if value is not None})


def _described_document(path: Path) -> Document | None:
    """The described cluster in a file; None if the file holds an ensemble, or something for its parser to refuse."""
    try:
        document = cluster_file.read_document(path)
    except resource_file.ResourceUnreadable:
        return None
    if cluster_file.is_ensemble(document) or not {"devices", "members"} & document.keys():
        return None
    return document


def _described(
    base: Document, inventory: Document | None, profiles: Document | None, sources: Sources, planning: Planning | None
) -> Question:
    files = [sources.file, *(path for path in (sources.inventory, sources.profiles) if path)]
    found = cluster_file.composed(base, inventory, profiles, " + ".join(map(str, files)))
    return Question(found.name, found.source, found.problems, planning)


async def _machine(ensemble: InferenceEnsemble, sources: Sources, profiles: Document | None) -> Document:
    """This machine's devices as an inventory, with the overhead and the co-location factor known of their class."""
    devices = await find_devices(sources.cpu_devices)
    held = held_bytes(ensemble, devices)
    entries = cluster_file.device_entries(
        devices, {d.device_class: UNMEASURED_OVERHEAD_BYTES + held.get(d.kind, 0) for d in devices}
    )
    told = (profiles or {}).get("devices")
    known = {
        e["class"]: e["overheadMiB"]
        for e in (told if isinstance(told, list) else [])
        if isinstance(e, dict) and isinstance(e.get("class"), str) and isinstance(e.get("overheadMiB"), int)
    }
    factors = known_factors(devices, sources.cache_folder)
    return {
        "devices": [
            {**e, "overheadMiB": known.get(e["class"], e["overheadMiB"])}
            | ({"colocation": factors[e["class"]]} if e["class"] in factors else {})
            for e in entries
        ]
    }


async def _measured(ensemble: InferenceEnsemble, sources: Sources) -> Question:
    devices = await find_devices(sources.cpu_devices)
    spec = ensemble.spec
    effort = Effort(spec.planning.profile_budget_s, sources.cache_folder)
    classes = len({d.device_class for d in devices})
    with Bar(len(spec.members) * classes, f"profiling {ensemble.name}") as bar:
        progress = MemberProgress(bar, spec.batching.sizes, len(spec.members) * classes)
        measured, colocation = await measured_all(ensemble, devices, effort, progress)
    for member in spec.members:
        results = [m for (name, _), m in measured.items() if name == member.name]
        if not any(m.points for m in results):
            raise ModelUnavailable(f"member {member.name!r} ({member.model.uri}): {results[0].error}")
    tensors = agreed_tensors(ensemble, {name: m.signature for (name, _), m in measured.items() if m.points})
    served = with_known_cost(measured, devices, tensors, sources.cache_folder)
    problem = serving_problem(ensemble, devices, served, colocation=colocation)
    label = " + ".join(f"{e['count']} x {e['class']}" for e in cluster_file.device_entries(devices, {}))
    return Question(ensemble.name, f"measured on this machine: {label}", ((label, problem),), spec.planning, here=True)


def with_source(error: InvalidProblem, source: str) -> InvalidProblem:
    """The same fault, naming the file."""
    return InvalidProblem([f"{source}: {fault}" for fault in error.faults])
