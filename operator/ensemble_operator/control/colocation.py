"""What members that share a GPU get done: who measures it, once for each class, and what is learnt. Pure.

It waits until all members are measured and served: a plan without the factor is a plan, and the fullest row is known
only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from ensemble_contract.plan import ModelSource
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.control.book import MAX_ERROR, Book, Sharing
from ensemble_operator.control.profiling import Measurer
from ensemble_operator.fleet import ColocationTask, ProfileJob, ProfileReport, SharedMember
from ensemble_operator.plans import Tensors
from ensemble_operator.profiles.colocating import BUDGET_S, fullest_rows

Row = Mapping[str, int]

PREFIX = "colocation-"
# Where it fails so often, the class is taken to share perfectly.
MAX_FAILURES = 5
OLD_WORKER = "the worker does not measure it: its image is of an older version"


def rows_to_share(problem: Problem, book: Book, now: float) -> dict[str, dict[str, int]]:
    """By class of GPU whose factor is to be measured now: the members to run together, with their batch sizes."""
    gpus = dict.fromkeys(device.device_class for device in problem.devices if device.kind == "cuda")
    wanted = [name for name in gpus if _is_open(book.sharing_of(name), now)]
    rows = fullest_rows(problem) if wanted else {}
    return {name: rows[name] for name in wanted if name in rows}


def assign_sharing(
    rows: Mapping[str, Row],
    sources: Mapping[str, ModelSource],
    tensors: Tensors,
    measurers: Iterable[Measurer],
    serving: Mapping[str, int],
    book: Book,
) -> dict[str, ProfileJob]:
    """The jobs to be given now: of each class one worker that measures nothing else, the one that serves least.

    `serving` counts the instances of each worker.
    """
    jobs = {}
    listed = list(measurers)
    for device_class, row in rows.items():
        libraries = book.libraries_of(device_class)
        alike = [m for m in listed if (m.device_class, m.libraries) == (device_class, libraries)]
        if any(is_sharing(m.report) and m.report.state == "running" for m in alike):
            continue
        free = [m.worker for m in alike if m.report.state != "running"]
        if free:
            chosen = min(free, key=lambda worker: (serving.get(worker, 0), worker))
            jobs[chosen] = _job(device_class, row, sources, tensors, book.sharing_of(device_class).failures)
    return jobs


def learn_sharing(book: Book, measurers: Iterable[Measurer], now: float) -> Book:
    """The book with the factors that workers have found, or why they have not."""
    for measurer in measurers:
        report, found = measurer.report, measurer.report.colocation
        if not is_sharing(report) or report.state == "running":
            continue
        before = book.sharing_of(measurer.device_class, measurer.libraries)
        if found is not None and found.factor is not None and found.factor > 0:
            after = Sharing(found.factor)
        elif before.factor or report.id == before.job:
            continue
        else:
            error = (found.error if found is not None else OLD_WORKER) or "it ended without a result"
            failures, job = before.failures + 1, report.id or ""
            after = Sharing(error=error[:MAX_ERROR], failed_at=now, failures=failures, job=job)
        book = book.with_sharing(measurer.device_class, measurer.libraries, after)
    return book


def is_sharing(report: ProfileReport) -> bool:
    """Whether a worker's job is one of these."""
    return (report.id or "").startswith(PREFIX)


def _is_open(known: Sharing, now: float) -> bool:
    return not known.factor and known.failures < MAX_FAILURES and (not known.failures or now >= known.retry_at)


def _job(
    device_class: str, row: Row, sources: Mapping[str, ModelSource], tensors: Tensors, failures: int
) -> ProfileJob:
    members = tuple(
        SharedMember(sources[name], tensors.inputs, tensors.outputs, batch_size) for name, batch_size in row.items()
    )
    # Another attempt at the same is another job.
    parts = (device_class, [(m.source.name, m.source.digest, m.batch_size) for m in members], failures)
    name = PREFIX + hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]
    return ProfileJob(name, (), ColocationTask(members, BUDGET_S))
