"""What there is to plan: which versions of the members, on which devices, with which profiles. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from ensemble_contract.plan import EnsemblePlan, ModelSource
from ensemble_operator.allocation.problem import DeviceSpec, Problem, Profile
from ensemble_operator.allocation.problem import Member as PlannedMember
from ensemble_operator.api import Devices, InferenceEnsemble
from ensemble_operator.control.book import Book
from ensemble_operator.control.observe import Observed
from ensemble_operator.control.pods import Pod
from ensemble_operator.control.questions import Cell, PlanAnswer, PlanQuestion
from ensemble_operator.control.target import Target, TargetDevice
from ensemble_operator.planning.settings import options_of
from ensemble_operator.plans import Tensors, model_source
from ensemble_operator.profiles.allowed_sizes import all_within
from ensemble_operator.profiles.measurements import (
    UNMEASURED_OVERHEAD_BYTES,
    Measurement,
    agreed_tensors,
)

# How long a worker that does not answer keeps its place in the plan: a container that starts again needs about that.
AWAY_GRACE_S = 60.0
# What its predecessor held is free a moment after it is gone.
UNSCHEDULABLE_GRACE_S = 10.0
# A plan that is not so much better than the one that runs is not worth the change.
WORTHWHILE_GAIN = 1.05
MAX_ROW_CACHE_BYTES = 256 << 20
ROW_CACHE_SHARE = 16


@dataclass(frozen=True, slots=True)
class Members:
    """Which version of each member shall be served now, in order, and what became of those that cannot be loaded.

    `unplaced` are served without an instance (there was never a plan with them), `kept` are served in their former
    version, `left_out` are new and not served yet; each with the cause.
    """

    sources: Mapping[str, ModelSource]
    unplaced: Mapping[str, str]
    kept: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def failed(self) -> dict[str, str]:
        """Members that cannot be loaded as the resource wants them, with the cause."""
        return {**self.unplaced, **self.kept, **self.left_out}


def wanted_sources(ensemble: InferenceEnsemble) -> dict[str, ModelSource]:
    """What the resource says about each member's model."""
    return {member.name: model_source(member, member) for member in ensemble.spec.members}


def members_to_serve(ensemble: InferenceEnsemble, failures: Mapping[str, str], running: EnsemblePlan | None) -> Members:
    """The versions to serve: those wanted, and of those that cannot be loaded, what runs instead."""
    former = {m.name: m.digest for m in running.gateway.members} if running is not None else {}
    old_sources = {(s.name, s.digest): s for s in running.sources} if running is not None else {}
    sources: dict[str, ModelSource] = {}
    unplaced: dict[str, str] = {}
    kept: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name, source in wanted_sources(ensemble).items():
        if name not in failures:
            sources[name] = source
            continue
        before = former.get(name)
        old = old_sources.get((name, before or ""))
        if before is not None and before != source.digest and old is not None:
            sources[name], kept[name] = old, failures[name]
        elif running is None or before == source.digest:
            sources[name], unplaced[name] = source, failures[name]
        else:
            left_out[name] = failures[name]
    return Members(sources, unplaced, kept, left_out)


def tensors_of(ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], book: Book) -> Tensors:
    """The inputs and outputs: the resource's, else what the models tell.

    Raises InvalidSpec if neither tells, or models differ.
    """
    told = {name: book.signature(source.digest) for name, source in sources.items()}
    signatures = {name: signature for name, signature in told.items() if signature is not None}
    inputs, outputs = agreed_tensors(ensemble, signatures)
    labels = {name: names for name, names in ensemble.spec.labels.items() if not isinstance(names, str)}
    return Tensors(inputs, outputs, labels)


def live_devices(
    ensemble: InferenceEnsemble, seen: Observed, overheads: Mapping[str, int], now: float
) -> dict[str, TargetDevice]:
    """The devices that are there, by worker: those that say so, and for a while those that said so before.

    `overheads` is what an idle worker takes, by class.
    """
    cache = row_cache_bytes(seen)
    target = seen.mirror.target
    found: dict[str, TargetDevice] = {}
    for view in seen.workers:
        if view.pod.leaving:
            continue
        if view.holds and view.device is not None:
            device = view.device
            share = 1 - _pool(ensemble, view.pod.pool).memory_headroom
            taken = overheads.get(device.device_class, UNMEASURED_OVERHEAD_BYTES) + cache
            usable = max(0, math.floor(device.capacity_bytes * share) - taken)
            found[view.name] = TargetDevice(device.device_class, device.kind, device.capacity_bytes, usable)
        elif target is not None and view.device is None and _may_come_back(view.pod, now):
            before = target.device(view.name)
            if before is not None:
                found[view.name] = before
    return found


def row_cache_bytes(seen: Observed) -> int:
    """What a worker keeps for rows: the same for all, so the smallest device says how much."""
    capacities = [v.device.capacity_bytes for v in seen.workers if v.holds and v.device is not None]
    target = seen.mirror.target
    capacities += [d.capacity_bytes for d in target.classes] if target is not None else []
    return min(MAX_ROW_CACHE_BYTES, min(capacities, default=MAX_ROW_CACHE_BYTES) // ROW_CACHE_SHARE)


def overheads_of(classes: Iterable[str], measured: Mapping[tuple[str, str], Measurement]) -> dict[str, int]:
    """What an idle worker takes, by class."""
    return {
        c: max((m.overhead_bytes for (_, k), m in measured.items() if k == c), default=0) or UNMEASURED_OVERHEAD_BYTES
        for c in classes
    }


def question(
    ensemble: InferenceEnsemble,
    members: Members,
    devices: Mapping[str, TargetDevice],
    measured: Mapping[tuple[str, str], Measurement],
    running: Iterable[Cell],
    factors: Mapping[str, float] | None = None,
) -> PlanQuestion:
    """The problem of placing the members that can be loaded on the devices.

    `factors` are the co-location factors of their classes, as far as they are known. Raises InvalidProblem.
    """
    able = [name for name in members.sources if name not in members.unplaced]
    placeable = {key: found for key, found in measured.items() if key[0] in able}
    profiles = tuple(
        Profile(member, device_class, p.batch_size, p.rows_per_s, p.latency_s, p.memory_bytes)
        for (member, device_class), found in all_within(placeable, ensemble.spec.batching.sizes).items()
        for p in found.points
    )
    classes = {device.device_class for device in devices.values()}
    problem = Problem(
        members=tuple(PlannedMember(name) for name in able),
        # Headroom, overhead and row cache are taken off already: pools may differ in them.
        devices=tuple(
            DeviceSpec(worker, d.device_class, "cpu" if d.kind == "cpu" else "cuda", max(1, d.usable_bytes))
            for worker, d in sorted(devices.items())
        ),
        profiles=profiles,
        batch_sizes=tuple(sorted({p.batch_size for p in profiles if p.device_class in classes})),
        headroom=0.0,
        colocation={name: factor for name, factor in (factors or {}).items() if name in classes},
    )
    versions = tuple(members.sources[name].digest for name in able)
    return PlanQuestion(problem, options_of(ensemble.spec.planning), versions, tuple(running))


def answered(asked: PlanQuestion, before: Target | None) -> Target | None:
    """The matrix that answers a question already, with the versions that are asked for; None if it is to be planned."""
    if before is None or asked.identity not in (before.question, before.examined):
        return None
    return msgspec.structs.replace(before, examined=asked.identity, digests=_digests(asked))


def target_of(
    asked: PlanQuestion, answer: PlanAnswer, devices: Mapping[str, TargetDevice], before: Target | None
) -> Target:
    """The matrix to go to: the answer's, or the one before where that is nearly as good and still possible."""
    names = [member.name for member in asked.problem.members]
    digests = _digests(asked)
    if before is not None and _is_good_enough(before, asked, answer):
        return msgspec.structs.replace(
            before,
            examined=asked.identity,
            digests=digests,
            predicted_rows_per_s=answer.running_rows_per_s,
            bound_rows_per_s=answer.bound_rows_per_s,
        )
    kinds = tuple(dict.fromkeys(devices[d.name] for d in asked.problem.devices))
    rows: dict[str, list[tuple[int, int]]] = {device.name: [] for device in asked.problem.devices}
    for worker, member, size in answer.cells:
        rows[worker].append((names.index(member), size))
    return Target(
        question=asked.identity,
        examined=asked.identity,
        digests=digests,
        rows={worker: tuple(row) for worker, row in rows.items()},
        classes=kinds,
        devices={d.name: kinds.index(devices[d.name]) for d in asked.problem.devices},
        predicted_rows_per_s=answer.predicted_rows_per_s,
        bound_rows_per_s=answer.bound_rows_per_s,
        why=answer.why,
    )


def need_bytes(
    members: Members,
    measured: Mapping[tuple[str, str], Measurement],
    book: Book,
    seen: Observed,
) -> dict[tuple[str, str, int], float]:
    """What an instance takes, by (digest, device class, batch size): as profiled, else as its worker says."""
    found: dict[tuple[str, str, int], float] = {}
    for view in seen.workers:
        for instance in view.report.instances if view.report is not None else ():
            if view.device is not None and instance.memory_bytes > 0:
                found[instance.digest, view.device.device_class, instance.batch_size] = instance.memory_bytes
    for digest, known in book.current():
        for point in (*known.declared, *known.points):
            found[digest, known.device_class, point.batch_size] = point.memory_bytes
    for (name, device_class), said in measured.items():
        if name in members.sources:
            for point in said.points:
                found[members.sources[name].digest, device_class, point.batch_size] = point.memory_bytes
    return found


def _digests(asked: PlanQuestion) -> tuple[tuple[str, str], ...]:
    """The members' versions, in order."""
    return tuple(zip((member.name for member in asked.problem.members), asked.versions, strict=True))


def _is_good_enough(before: Target, asked: PlanQuestion, answer: PlanAnswer) -> bool:
    """Whether the matrix that runs answers for the same members on the same devices, nearly as well."""
    if [name for name, _ in before.digests] != [member.name for member in asked.problem.members]:
        return False
    same_devices = set(before.rows) == {device.name for device in asked.problem.devices}
    if not same_devices or answer.running_rows_per_s <= 0:
        return False
    if asked.options.objective == "devices":
        used = len({worker for worker, _, _ in answer.cells})
        reached = answer.running_rows_per_s >= min(asked.options.target_rows_per_s, answer.predicted_rows_per_s)
        return reached and used >= sum(1 for row in before.rows.values() if row)
    return answer.predicted_rows_per_s < WORTHWHILE_GAIN * answer.running_rows_per_s


def _may_come_back(pod: Pod, now: float) -> bool:
    """Whether a worker that does not answer is soon to.

    While its kubelet finds it Ready it was only slow; a pod for which there is no place is not waited for.
    """
    if pod.unschedulable and now - pod.created > UNSCHEDULABLE_GRACE_S:
        return False
    return pod.away_since is None or now - pod.away_since < AWAY_GRACE_S


def _pool(ensemble: InferenceEnsemble, pool: int) -> Devices:
    return ensemble.pools[pool] if pool < len(ensemble.pools) else ensemble.pools[0]
