"""When it is measured what members that share a GPU get done, by whom, and what is learnt from it."""

from __future__ import annotations

import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.control.book import FIRST_RETRY_S, Book, Sharing, read_book, write_book
from ensemble_operator.control.colocation import (
    MAX_FAILURES,
    OLD_WORKER,
    PREFIX,
    assign_sharing,
    is_sharing,
    learn_sharing,
    rows_to_share,
)
from ensemble_operator.control.planning import members_to_serve, question, wanted_sources
from ensemble_operator.control.profiling import Measurer, measured
from ensemble_operator.control.target import TargetDevice
from ensemble_operator.fleet import ColocationResult, ProfileReport
from ensemble_operator.plans import Tensors
from tests.unit.control.ensembles import CLASS, ensemble, known

GIB = 1 << 30
NOW = 1_000.0
TWO = ensemble("a", "b")
SOURCES = wanted_sources(TWO)
TENSORS = Tensors((TensorSpec("x", "FP32", (8,)),), (TensorSpec("y", "FP32", (2,)),), {})
ROW = {"a": 8, "b": 8}
OLD, NEW = "torch 2.9.1", "torch 2.10.0"


def problem(kind: str = "cuda", devices: int = 2, members: str = "ab") -> Problem:
    profiles = tuple(Profile(m, CLASS, size, 100.0 * size, 0.01, 1 << 20) for m in members for size in (1, 8))
    specs = tuple(DeviceSpec(f"w{i}", CLASS, kind, GIB) for i in range(devices))  # type: ignore[arg-type]
    return Problem(tuple(map(Member, members)), specs, profiles, (1, 8))


def measurer(worker: str, report: ProfileReport | None = None, libraries: str = NEW) -> Measurer:
    return Measurer(worker, CLASS, report or ProfileReport(), libraries)


def used(*libraries: str) -> Book:
    return Book().with_running((CLASS, one) for one in libraries)


def assigned(measurers: list[Measurer], book: Book, serving: dict[str, int] | None = None) -> dict[str, str]:
    jobs = assign_sharing({CLASS: ROW}, SOURCES, TENSORS, measurers, serving or {}, book)
    return {worker: job.id for worker, job in jobs.items()}


def ended(job: str, result: ColocationResult | None) -> ProfileReport:
    return ProfileReport(job, "done", (), result)


def test_what_members_get_done_matters_only_where_they_share_a_gpu() -> None:
    assert rows_to_share(problem(devices=1), used(NEW), NOW) == {CLASS: ROW}
    assert rows_to_share(problem("cpu", devices=1), used(NEW), NOW) == {}
    # Worst-fit gives each a device of its own.
    assert rows_to_share(problem(devices=2), used(NEW), NOW) == {}
    assert rows_to_share(problem(devices=1, members="a"), used(NEW), NOW) == {}


def test_it_is_measured_once_and_after_a_failure_later() -> None:
    book, shared = used(NEW), problem(devices=1)
    assert rows_to_share(shared, book.with_sharing(CLASS, NEW, Sharing(0.9)), NOW) == {}
    failed = book.with_sharing(CLASS, NEW, Sharing(error="no room", failed_at=NOW, failures=1, job="j"))
    assert rows_to_share(shared, failed, NOW + FIRST_RETRY_S - 1) == {}
    assert rows_to_share(shared, failed, NOW + FIRST_RETRY_S) == {CLASS: ROW}
    often = book.with_sharing(CLASS, NEW, Sharing(error="no room", failed_at=NOW, failures=MAX_FAILURES, job="j"))
    assert rows_to_share(shared, often, 1e9) == {}
    # With other libraries it is another question.
    other = used(OLD).with_sharing(CLASS, NEW, Sharing(0.9))
    assert rows_to_share(shared, other, NOW) == {CLASS: ROW}


def test_the_worker_that_serves_least_measures_and_only_one_of_a_class() -> None:
    workers = [measurer("w0"), measurer("w1"), measurer("w2", libraries=OLD)]
    ((worker, job),) = assigned(workers, used(NEW, OLD), {"w0": 2, "w1": 1, "w2": 0}).items()
    assert worker == "w1"
    assert job.startswith(PREFIX)
    assert assigned([measurer("w0", ProfileReport(job, "running")), measurer("w1")], used(NEW)) == {}
    assert assigned([measurer("w0", ProfileReport("members", "running")), measurer("w1")], used(NEW)) == {"w1": job}
    assert assigned([measurer("w0", ProfileReport("members", "running"))], used(NEW)) == {}


def test_the_job_has_the_members_at_their_sizes_and_another_attempt_is_another_job() -> None:
    (job,) = assign_sharing({CLASS: ROW}, SOURCES, TENSORS, [measurer("w0")], {}, used(NEW)).values()
    assert job.tasks == ()
    assert job.colocation is not None
    assert [(m.source, m.inputs, m.outputs, m.batch_size) for m in job.colocation.members] == [
        (SOURCES[name], TENSORS.inputs, TENSORS.outputs, 8) for name in "ab"
    ]
    assert 0 < job.colocation.budget_s <= 60
    again = used(NEW).with_sharing(CLASS, NEW, Sharing(error="no room", failed_at=NOW, failures=1, job=job.id))
    assert assigned([measurer("w0")], used(NEW)) == {"w0": job.id}
    assert assigned([measurer("w0")], again)["w0"] != job.id


def test_a_factor_is_learnt_kept_and_planned_with() -> None:
    found = ended(PREFIX + "1", ColocationResult(0.75, finished=True))
    book = learn_sharing(used(NEW), [measurer("w0", found)], NOW)
    assert book.factors() == {CLASS: 0.75}
    again = read_book(write_book(book)).with_running([(CLASS, NEW)])
    assert again.factors() == {CLASS: 0.75}
    members = members_to_serve(TWO, {}, None)
    for name in "ab":
        again = again.with_known(SOURCES[name].digest, known(1, 8, libraries=NEW))
    figures = measured(TWO, members.sources, [CLASS], again, NOW)
    devices = {"w0": TargetDevice(CLASS, "cuda", GIB, GIB)}
    asked = question(TWO, members, devices, figures, (), again.factors() | {"elsewhere": 0.5})
    assert asked.problem.colocation == {CLASS: 0.75}
    assert asked.identity != question(TWO, members, devices, figures, ()).identity


@pytest.mark.parametrize(
    ("result", "error"),
    [
        (ColocationResult(None, "no room", finished=True), "no room"),
        (ColocationResult(None, None, finished=True), "it ended without a result"),
        (None, OLD_WORKER),
    ],
)
def test_what_fails_is_kept_with_its_cause_and_counted_once(result: ColocationResult | None, error: str) -> None:
    report = [measurer("w0", ended(PREFIX + "1", result))]
    book = learn_sharing(used(NEW), report, NOW)
    assert book.sharing_of(CLASS) == Sharing(error=error, failed_at=NOW, failures=1, job=PREFIX + "1")
    assert learn_sharing(book, report, NOW + 5) == book
    assert book.factors() == {}
    assert read_book(write_book(book)).sharing == book.sharing


def test_other_jobs_and_those_under_way_teach_nothing() -> None:
    book = used(NEW)
    running = ProfileReport(PREFIX + "1", "running", (), ColocationResult())
    assert learn_sharing(book, [measurer("w0", running), measurer("w1", ended("members", None))], NOW) == book
    assert is_sharing(running)
    assert not is_sharing(ProfileReport())
    # A factor that is known stays, whatever comes later.
    known_already = book.with_sharing(CLASS, NEW, Sharing(0.9))
    late = [measurer("w0", ended(PREFIX + "2", ColocationResult(None, "no room", finished=True)))]
    assert learn_sharing(known_already, late, NOW) == known_already


def test_a_book_that_somebody_has_damaged_knows_no_factor_and_libraries_that_left_are_forgotten() -> None:
    assert read_book({"colocation": '{"K": {"": {"factor": -1.0}}}'}).sharing == {}
    assert read_book({"colocation": '["K"]'}).sharing == {}
    both = used(NEW).with_sharing(CLASS, OLD, Sharing(0.8)).with_sharing(CLASS, NEW, Sharing(0.9))
    assert both.only([]).sharing == {(CLASS, NEW): Sharing(0.9)}
