"""What is to be measured, by whom, and what was found: members spread over the workers held. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ensemble_contract.plan import ModelSource
from ensemble_operator.api import InferenceEnsemble, Member, member_digest
from ensemble_operator.control.book import MAX_ERROR, Book, Known
from ensemble_operator.fleet import ProfileJob, ProfileReport, ProfileResult, ProfileTask
from ensemble_operator.profiles.allowed_sizes import within
from ensemble_operator.profiles.measurements import Measurement, Point, Signature, declared

# For one batch size, when it alone stands between the ensemble and its first plan.
FIRST_BUDGET_S = 2.0
# In place of a job: the version failed when it was to serve.
SERVING = "serving"


@dataclass(frozen=True, slots=True)
class Need:
    """A version to be measured on a class of device. `urgent`: without it there is no plan."""

    member: str
    device_class: str
    sizes: tuple[int, ...]
    urgent: bool
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Needs:
    """What is to be measured now, and when (Unix time) something that failed is to be tried again."""

    now: tuple[Need, ...]
    retry_at: float | None

    @property
    def urgent(self) -> tuple[Need, ...]:
        """Those that the next plan waits for."""
        return tuple(need for need in self.now if need.urgent)


@dataclass(frozen=True, slots=True)
class Measurer:
    """A worker that can measure: its device's class and libraries, and what it measures or has measured."""

    worker: str
    device_class: str
    report: ProfileReport
    libraries: str = ""


def needs(
    ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], classes: Iterable[str], book: Book, now: float
) -> Needs:
    """What is not known yet of the members on the classes: first the smallest size of each, then the others.

    A declared profile is believed; then the model is only read where nobody else tells its inputs and outputs.
    """
    spec = ensemble.spec
    tells_tensors = bool(spec.inputs and spec.outputs)
    found: list[Need] = []
    retries: list[float] = []
    smallest = (min(spec.batching.sizes),)
    for device_class in dict.fromkeys(classes):
        for member in spec.members:
            digest = sources[member.name].digest
            known = book.of(digest, device_class)
            if known.error:
                retries.append(known.retry_at)
                if now >= known.retry_at and not known.points:
                    found.append(Need(member.name, device_class, smallest, urgent=False, attempt=known.failures))
                continue
            is_declared = bool(within(declared(member, device_class), spec.batching.sizes).points)
            if is_declared and (tells_tensors or book.signature(digest) is not None):
                continue
            is_known = bool(within(known.measurement(), spec.batching.sizes).points)
            if not is_known and smallest[0] not in known.tried:
                found.append(Need(member.name, device_class, smallest, urgent=True))
            elif not (is_declared or _is_fixed(known)) and (
                rest := tuple(s for s in spec.batching.sizes if s not in known.tried)
            ):
                found.append(Need(member.name, device_class, rest, urgent=not is_known))
    return Needs(tuple(found), min((at for at in retries if at > now), default=None))


def assign(
    ensemble: InferenceEnsemble,
    sources: Mapping[str, ModelSource],
    wanted: Sequence[Need],
    measurers: Sequence[Measurer],
) -> dict[str, ProfileJob]:
    """The jobs that free workers are to be given now, urgent needs first and alone; busy workers keep theirs.

    Nobody is given more than half of its part of what is open (guided self-scheduling, Polychronopoulos and Kuck
    1987): a worker that comes later finds something to do, and one with slow members does not end long after.
    """
    jobs = {}
    spec = ensemble.spec
    expected = sum(pool.count for pool in ensemble.pools)
    needed = [need for need in wanted if need.urgent] or list(wanted)
    for device_class in dict.fromkeys(need.device_class for need in needed):
        alike = [m for m in measurers if m.device_class == device_class]
        busy = {r.digest for m in alike if m.report.state == "running" for r in m.report.results if not r.finished}
        free = [m for m in alike if m.report.state != "running"]
        todo = [n for n in needed if n.device_class == device_class and sources[n.member].digest not in busy]
        share = math.ceil(len(todo) / (2 * max(expected, len(alike))))
        for index, measurer in enumerate(free):
            mine = todo[index * share : (index + 1) * share]
            if mine:
                share_s = spec.planning.profile_budget_s * min(1.0, len(alike) / len(spec.members))
                jobs[measurer.worker] = _job(ensemble, sources, mine, share_s)
    return jobs


def obsolete(measurer: Measurer, digests: Iterable[str]) -> bool:
    """Whether a worker measures only versions that nobody wants any more."""
    report, wanted = measurer.report, set(digests)
    open_digests = {result.digest for result in report.results if not result.finished}
    return report.state == "running" and bool(open_digests) and not open_digests & wanted


def learn(book: Book, measurers: Iterable[Measurer], sizes: Sequence[int], now: float) -> Book:
    """The book with what workers have found out. `sizes` are the batch sizes that the ensemble allows."""
    for measurer in measurers:
        for result in measurer.report.results:
            before = book.of(result.digest, measurer.device_class, measurer.libraries)
            after = _learnt(before, measurer.report.id or "", result, min(sizes), sizes, now)
            if after != before:
                book = book.with_known(result.digest, after)
    return book


def measured(
    ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], classes: Iterable[str], book: Book, now: float
) -> dict[tuple[str, str], Measurement]:
    """What planning works with, by (member, class): declared where the resource says so, else measured.

    Of figures at other batch sizes than the spec's those are told that there are, for whoever plans to refuse. Where a
    version has failed lately, nothing: it is placed elsewhere.
    """
    found = {}
    for device_class in dict.fromkeys(classes):
        for member in ensemble.spec.members:
            if member.name not in sources:
                continue
            known = book.of(sources[member.name].digest, device_class)
            # What runs may be a former version, of which the resource says nothing any more.
            is_asked_for = sources[member.name].digest == member_digest(member)
            said = declared(member, device_class).points if is_asked_for else ()
            failed = is_asked_for and _failure(member, known, device_class, now)
            points = (
                () if failed else _points(known, (said, known.points, known.declared), ensemble.spec.batching.sizes)
            )
            overhead = known.overhead_bytes or book.idle_bytes(device_class)
            found[member.name, device_class] = Measurement(known.signature or Signature(), points, overhead)
    return found


def failures(
    ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], classes: Iterable[str], book: Book, now: float
) -> dict[str, str]:
    """Members that no class can load, with the cause."""
    listed = tuple(dict.fromkeys(classes))
    found = {}
    for member in ensemble.spec.members:
        causes = [_failure(member, book.of(sources[member.name].digest, c), c, now) for c in listed]
        if causes and all(causes):
            found[member.name] = causes[0]
    return found


def note_failure(book: Book, digest: str, device_class: str, error: str, now: float) -> Book:
    """The book with a version that a worker could not load when it was to serve there."""
    before = book.of(digest, device_class)
    if before.error and now < before.retry_at:
        return book
    after = msgspec.structs.replace(
        before, error=error[:MAX_ERROR], failed_at=now, failures=before.failures + 1, job=SERVING
    )
    return book.with_known(digest, after)


def note_ready(book: Book, ready: Iterable[tuple[str, str]]) -> Book:
    """The book in which versions that serve now, by (digest, device class), have not failed."""
    for digest, device_class in ready:
        known = book.of(digest, device_class)
        if known.error:
            cleared = msgspec.structs.replace(known, error="", failed_at=0.0, failures=0, job="")
            book = book.with_known(digest, cleared)
    return book


def note_declared(
    book: Book, ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], classes: Iterable[str]
) -> Book:
    """The book with what the resource declares, for as long as these versions run."""
    for device_class in dict.fromkeys(classes):
        for member in ensemble.spec.members:
            points = declared(member, device_class).points
            known = book.of(sources[member.name].digest, device_class)
            if points and known.declared != points:
                book = book.with_known(sources[member.name].digest, msgspec.structs.replace(known, declared=points))
    return book


def _points(known: Known, candidates: Sequence[tuple[Point, ...]], sizes: Sequence[int]) -> tuple[Point, ...]:
    """The first figures at the spec's batch sizes; the first at any, if none are."""
    signature = known.signature or Signature()
    allowed = (within(Measurement(signature, points), sizes).points for points in candidates)
    return next((points for points in (*allowed, *candidates) if points), ())


def _is_fixed(known: Known) -> bool:
    """Whether a version takes a batch of one size, which is known."""
    fixed = known.signature.fixed_batch if known.signature is not None else None
    return any(point.batch_size == fixed for point in known.points)


def _failure(member: Member, known: Known, device_class: str, now: float) -> str:
    """Why a version cannot be loaded on a class now; empty if it can, or nobody knows."""
    has_figures = bool(known.points or declared(member, device_class).points)
    return known.error if now < known.retry_at or not has_figures else ""


def _job(
    ensemble: InferenceEnsemble, sources: Mapping[str, ModelSource], mine: Sequence[Need], share_s: float
) -> ProfileJob:
    spec = ensemble.spec
    tasks = tuple(
        ProfileTask(
            sources[need.member],
            spec.inputs,
            spec.outputs,
            need.sizes,
            min(share_s, FIRST_BUDGET_S) if need.urgent else share_s,
        )
        for need in mine
    )
    # Another attempt at the same is another job.
    parts = [(need.member, sources[need.member], need.sizes, need.attempt) for need in mine]
    return ProfileJob(hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16], tasks)


def _learnt(before: Known, job: str, result: ProfileResult, smallest: int, sizes: Sequence[int], now: float) -> Known:
    points = {p.batch_size: p for p in (*before.points, *result.points)}
    tried = {*before.tried, *points}
    error = (result.error or "")[:MAX_ERROR]
    if result.finished and points and (error or any(p.batch_size != smallest for p in result.points)):
        # A worker stops at the size that brings nothing more, or does not fit: larger ones would not, either. What the
        # spec lists since then was not asked for.
        tried |= set(result.sizes or sizes)
    after = msgspec.structs.replace(
        before,
        overhead_bytes=before.overhead_bytes or result.overhead_bytes,
        signature=result.signature or before.signature,
        points=tuple(points[size] for size in sorted(points)),
        tried=tuple(sorted(tried)),
    )
    if points and before.job != SERVING:
        return msgspec.structs.replace(after, error="", failed_at=0.0, failures=0, job="")
    if error and result.finished and job != before.job:
        return msgspec.structs.replace(after, error=error, failed_at=now, failures=before.failures + 1, job=job)
    return after
