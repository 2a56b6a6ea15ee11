"""What is measured by whom, and what is learnt from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from ensemble_operator.control.book import (
    FIRST_RETRY_S,
    HASHES_ANNOTATION,
    MAX_CLASSES,
    Book,
    Known,
    hashes_of,
    kept_book,
    read_book,
    write_book,
)
from ensemble_operator.control.planning import wanted_sources
from ensemble_operator.control.profiling import (
    Measurer,
    assign,
    failures,
    learn,
    measured,
    needs,
    note_declared,
    note_failure,
    note_ready,
    obsolete,
)
from ensemble_operator.fleet import ProfileReport, ProfileResult
from ensemble_operator.profiles.measurements import Point, Signature
from tests.unit.control.ensembles import CLASS, ensemble, known, profiled

FIVE = ensemble("a", "b", "c", "d", "e")
SOURCES = wanted_sources(FIVE)
DIGEST = {name: source.digest for name, source in SOURCES.items()}
IDLE = ProfileReport()
OLD, NEW = "torch 2.9.1", "torch 2.10.0"


def result(
    member: str, *sizes: int, finished: bool = True, error: str | None = None, asked: tuple[int, ...] = ()
) -> ProfileResult:
    points = tuple(Point(size, 100.0 * size, 0.01, 1 << 20) for size in sizes)
    return ProfileResult(
        member, DIGEST[member], points=points, overhead_bytes=7, error=error, finished=finished, sizes=asked
    )


def free(*workers: str) -> list[Measurer]:
    return [Measurer(worker, CLASS, IDLE) for worker in workers]


def test_the_smallest_size_of_every_member_comes_first() -> None:
    found = needs(FIVE, SOURCES, [CLASS, CLASS], Book(), 0.0)
    assert [(n.member, n.sizes, n.urgent) for n in found.now] == [(name, (1,), True) for name in "abcde"]


def test_the_other_sizes_follow_in_the_background() -> None:
    book = Book().with_known(DIGEST["a"], known(1))
    found = needs(FIVE, SOURCES, [CLASS], book, 0.0)
    assert (found.now[0].member, found.now[0].sizes, found.now[0].urgent) == ("a", (8, 32), False)
    assert [need.member for need in found.urgent] == ["b", "c", "d", "e"]


def test_workers_are_dealt_a_part_and_come_back_for_more() -> None:
    wanted = needs(FIVE, SOURCES, [CLASS], Book(), 0.0).now
    jobs = assign(FIVE, SOURCES, wanted, free("w0", "w1"))
    assert {w: [t.source.name for t in job.tasks] for w, job in jobs.items()} == {"w0": ["a", "b"], "w1": ["c", "d"]}


def test_the_first_worker_leaves_something_to_those_that_come_later() -> None:
    wanted = needs(FIVE, SOURCES, [CLASS], Book(), 0.0).now
    first = assign(FIVE, SOURCES, wanted, free("w0"))["w0"]
    names = [task.source.name for task in first.tasks]
    assert names == ["a", "b"]
    busy = Measurer("w0", CLASS, ProfileReport("1", "running", tuple(result(n, finished=False) for n in names)))
    jobs = assign(FIVE, SOURCES, wanted, [busy, *free("w1")])
    assert {w: [t.source.name for t in job.tasks] for w, job in jobs.items()} == {"w1": ["c"]}


def test_the_same_needs_are_the_same_job_and_another_attempt_is_another() -> None:
    wanted = needs(FIVE, SOURCES, [CLASS], Book(), 0.0).now
    one, again = (assign(FIVE, SOURCES, wanted, free("w0"))["w0"] for _ in range(2))
    assert one.id == again.id
    book = learn(Book(), [Measurer("w0", CLASS, ProfileReport("7", "done", (result("a", error="gone"),)))], [1], 0.0)
    later = needs(FIVE, SOURCES, [CLASS], book, FIRST_RETRY_S + 1).now
    assert [need.attempt for need in later] == [1, 0, 0, 0, 0]


def test_results_are_learnt_as_they_come_and_kept() -> None:
    sizes = FIVE.spec.batching.sizes
    first = Measurer("w0", CLASS, ProfileReport("7", "running", (result("a", 1), result("b", finished=False))))
    book = learn(Book(), [first], sizes, 0.0)
    assert [p.batch_size for p in book.of(DIGEST["a"], CLASS).points] == [1]
    assert book.of(DIGEST["b"], CLASS).points == ()
    # It stopped at 8: more is not worth measuring, and never asked for again.
    more = Measurer("w0", CLASS, ProfileReport("8", "done", (result("a", 8),)))
    book = learn(book, [more], sizes, 0.0)
    assert [p.batch_size for p in book.of(DIGEST["a"], CLASS).points] == [1, 8]
    assert "a" not in {need.member for need in needs(FIVE, SOURCES, [CLASS], book, 0.0).now}
    assert read_book(write_book(book)) == book


def test_batch_sizes_that_the_spec_lists_later_are_measured_then() -> None:
    report = result("a", 1, 8, asked=(1, 8, 32))
    book = learn(Book(), [Measurer("w0", CLASS, ProfileReport("7", "done", (report,)))], FIVE.spec.batching.sizes, 0.0)
    assert "a" not in {need.member for need in needs(FIVE, SOURCES, [CLASS], book, 0.0).now}
    sizes = (4, 16, 32)
    later = replace(FIVE, spec=replace(FIVE.spec, batching=replace(FIVE.spec.batching, sizes=sizes)))
    # The worker still shows the job of before.
    book = learn(book, [Measurer("w0", CLASS, ProfileReport("7", "done", (report,)))], sizes, 0.0)
    first = needs(later, SOURCES, [CLASS], book, 0.0).now[0]
    assert (first.member, first.sizes, first.urgent) == ("a", (4,), True)
    four = result("a", 1, 4, 8, asked=(4,))
    book = learn(book, [Measurer("w0", CLASS, ProfileReport("8", "done", (four,)))], sizes, 0.0)
    rest = needs(later, SOURCES, [CLASS], book, 0.0).now[0]
    assert (rest.sizes, rest.urgent) == ((16,), False)
    assert [p.batch_size for p in measured(later, SOURCES, [CLASS], book, 0.0)["a", CLASS].points] == [4]


def test_a_model_of_a_fixed_batch_is_measured_once_whatever_the_spec_lists() -> None:
    told = known(16, signature=Signature(fixed_batch=16))
    book = Book().with_known(DIGEST["a"], told)
    assert "a" not in {need.member for need in needs(FIVE, SOURCES, [CLASS], book, 0.0).now}
    assert [p.batch_size for p in measured(FIVE, SOURCES, [CLASS], book, 0.0)["a", CLASS].points] == [16]


def test_a_failure_counts_once_for_each_job_and_is_tried_again_later_and_later() -> None:
    report = Measurer("w0", CLASS, ProfileReport("7", "done", (result("a", error="no such file"),)))
    book = learn(learn(Book(), [report], [1], 100.0), [report], [1], 105.0)
    found = book.of(DIGEST["a"], CLASS)
    assert (found.failures, found.failed_at, found.error) == (1, 100.0, "no such file")
    assert failures(FIVE, SOURCES, [CLASS], book, 101.0) == {"a": "no such file"}
    assert "a" not in {need.member for need in needs(FIVE, SOURCES, [CLASS], book, 101.0).now}
    assert needs(FIVE, SOURCES, [CLASS], book, 101.0).retry_at == 100.0 + FIRST_RETRY_S
    again = Measurer("w0", CLASS, ProfileReport("8", "done", (result("a", error="no such file"),)))
    book = learn(book, [again], [1], 200.0)
    assert book.of(DIGEST["a"], CLASS).retry_at == 200.0 + 2 * FIRST_RETRY_S
    mended = Measurer("w0", CLASS, ProfileReport("9", "done", (result("a", 1),)))
    assert failures(FIVE, SOURCES, [CLASS], learn(book, [mended], [1], 300.0), 301.0) == {}


def test_a_version_that_failed_to_serve_is_set_aside_for_a_while() -> None:
    book = Book().with_known(DIGEST["a"], known(1))
    book = note_failure(book, DIGEST["a"], CLASS, "out of memory", 100.0)
    assert note_failure(book, DIGEST["a"], CLASS, "out of memory", 101.0) == book
    assert failures(FIVE, SOURCES, [CLASS], book, 102.0) == {"a": "out of memory"}
    assert measured(FIVE, SOURCES, [CLASS], book, 102.0)["a", CLASS].points == ()
    assert failures(FIVE, SOURCES, [CLASS], book, 100.0 + FIRST_RETRY_S) == {}
    assert failures(FIVE, SOURCES, [CLASS], note_ready(book, [(DIGEST["a"], CLASS)]), 102.0) == {}


def test_a_declared_profile_is_believed_unless_nobody_tells_the_tensors() -> None:
    declared = ensemble(members=[profiled("a")])
    sources = wanted_sources(declared)
    assert needs(declared, sources, [CLASS], Book(), 0.0).now == ()
    untold = ensemble(members=[profiled("a")], inputs=False)
    assert [need.sizes for need in needs(untold, sources, [CLASS], Book(), 0.0).now] == [(1,)]
    told = Book().with_known(sources["a"].digest, known(1, signature=Signature((), ())))
    assert needs(untold, sources, [CLASS], told, 0.0).now == ()


def test_a_declared_profile_is_remembered_for_as_long_as_the_version_runs() -> None:
    declared = ensemble(members=[profiled("a", memory="77Mi")])
    sources = wanted_sources(declared)
    book = note_declared(Book(), declared, sources, [CLASS])
    assert [p.memory_bytes for p in book.of(sources["a"].digest, CLASS).declared] == [77 << 20]
    replaced = ensemble(members=[profiled("a", memory="5Mi", version="2")])
    still = measured(replaced, sources, [CLASS], book, 0.0)
    assert [p.memory_bytes for p in still["a", CLASS].points] == [77 << 20]


def test_measuring_what_nobody_wants_is_obsolete() -> None:
    busy = Measurer("w0", CLASS, ProfileReport("1", "running", (result("a", finished=False),)))
    assert obsolete(busy, ["other"])
    assert not obsolete(busy, [DIGEST["a"]])


def test_an_idle_workers_memory_is_kept_as_first_seen() -> None:
    book = Book().with_idle(CLASS, OLD, 1000).with_idle(CLASS, OLD, 1010)
    assert book.idle_bytes(CLASS) == 0
    assert book.with_running([(CLASS, OLD)]).idle_bytes(CLASS) == 1000
    assert book.with_running([(CLASS, NEW)]).idle_bytes(CLASS) == 0
    assert read_book(write_book(book)) == book


def test_what_another_torch_has_measured_counts_for_nothing() -> None:
    """A new image of the workers has all of it measured again, on those that have the image."""
    book = Book().with_known(DIGEST["a"], msgspec.structs.replace(known(1, 8, 32), libraries=OLD))
    both = ensemble("a")
    sources = wanted_sources(both)
    before, after = book.with_running([(CLASS, OLD)]), book.with_running([(CLASS, NEW), (CLASS, OLD)])
    assert needs(both, sources, [CLASS], before, 0.0).now == ()
    assert [(n.member, n.urgent) for n in needs(both, sources, [CLASS], after, 0.0).now] == [("a", True)]
    assert measured(both, sources, [CLASS], after, 0.0)["a", CLASS].points == ()
    report = ProfileReport("7", "done", (result("a", 1),))
    learnt = learn(after, [Measurer("w1", CLASS, report, OLD)], [1, 8, 32], 0.0)
    assert learnt.of(DIGEST["a"], CLASS).points == (), "what an old worker says is of the old image"
    learnt = learn(after, [Measurer("w0", CLASS, report, NEW)], [1, 8, 32], 0.0)
    assert [point.rows_per_s for point in learnt.of(DIGEST["a"], CLASS).points] == [100.0]
    assert [d for d, _ in learnt.current()] == [DIGEST["a"]]
    assert read_book(write_book(learnt)).known == learnt.known


def test_without_a_worker_what_was_known_last_counts() -> None:
    """All of them may be starting again: that is no reason to plan anew."""
    book = Book().with_known(DIGEST["a"], msgspec.structs.replace(known(1), libraries=OLD)).with_running([])
    assert [p.batch_size for p in book.of(DIGEST["a"], CLASS).points] == [1]


def test_the_book_does_not_grow() -> None:
    """An image goes when what it measured is known anew; classes that nobody has are kept, but not many."""
    old, new = (msgspec.structs.replace(known(1), libraries=libraries) for libraries in (OLD, NEW))
    book = Book().with_known("a", old).with_idle(CLASS, OLD, 1).with_running([(CLASS, NEW)])
    assert book.only(["a"]).known == book.known, "until it is known anew"
    measured_anew = book.with_known("a", new).with_idle(CLASS, NEW, 2).only(["a"])
    assert set(measured_anew.known) == {("a", CLASS, NEW)}
    assert measured_anew.idle == {(CLASS, NEW): 2}
    mixed = book.with_known("a", new).with_running([(CLASS, NEW), (CLASS, OLD)])
    assert mixed.only(["a"]).known == mixed.known, "while pods are replaced one after the other"
    assert mixed.only(["b"]).known == {}
    for number in range(3 * MAX_CLASSES):
        mixed = mixed.with_known("a", Known(f"class-{number}", NEW)).with_idle(f"class-{number}", NEW, 1)
    kept = {device_class for _, device_class, _ in mixed.only(["a"]).known}
    assert len(kept) == MAX_CLASSES
    assert CLASS in kept
    assert {device_class for device_class, _ in mixed.only(["a"]).idle} <= kept


def test_a_damaged_book_is_not_believed() -> None:
    good = write_book(Book().with_known("d" * 16, known(1)))
    assert read_book({**good, "e" * 16: "[{", "idle": "{]"}) == read_book(good)


def test_a_book_that_somebody_has_edited_is_not_believed() -> None:
    book = Book().with_known("d" * 16, known(1))
    data = write_book(book)
    stored: dict[str, Any] = {"metadata": {"annotations": {HASHES_ANNOTATION: hashes_of(data)}}, "data": data}
    assert kept_book(stored) == book
    assert kept_book({**stored, "data": {name: text.replace("1000", "9000") for name, text in data.items()}}) is None
    assert kept_book({**stored, "data": {}}) is None
    assert kept_book({**stored, "data": {**data, "theirs": "[]"}}) == book
    assert kept_book({"metadata": {}, "data": data}) == book, "as it was written before there was a hash"
    assert kept_book(None) is None
