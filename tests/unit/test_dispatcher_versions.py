"""Versions come and go in a dispatcher: columns are shared, dropped and used again, and nothing is lost by it."""

from __future__ import annotations

import pytest

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.columns import MAX_COLUMNS, Columns
from ensemble_gateway.dispatcher import Dispatcher
from ensemble_gateway.queues import Request

A1, A2, B1 = ("a", "1"), ("a", "2"), ("b", "1")
LONG_S = 1000.0


def state(worker: str, *versions: tuple[str, str], serial: bool = True) -> State:
    live = tuple(LiveInstance(10 + i, name, digest, 8, 0.001) for i, (name, digest) in enumerate(versions))
    return State(worker, 1, live, serial, 2)


def request(columns: tuple[int, ...], at: int = 0, quorum: int = 0) -> Request:
    return Request(1, ((at, 1),), sum(1 << column for column in columns), quorum or len(columns), None)


def run(dispatcher: Dispatcher, now: float) -> list[Request]:
    """Answer all that can be answered."""
    finished = []
    while batches := dispatcher.assign(now):
        for batch in batches:
            assert dispatcher.take(batch.id, now) is batch
            finished += dispatcher.settle(batch, [0.001] * len(batch.instances))
    return finished


def test_a_version_has_one_column_while_any_plan_has_it() -> None:
    dispatcher = Dispatcher([A1, B1])
    assert dispatcher.columns_of([B1, A2]) == (1, 2)
    assert dispatcher.keep_only({1, 2}) == [0]
    assert dispatcher.columns_of([A1, B1, A2]) == (0, 1, 2), "the free column is used again"


def test_what_workers_said_before_counts_for_a_new_version() -> None:
    dispatcher = Dispatcher([A1, B1])
    dispatcher.update(state("w", A1, A2, B1))
    columns = dispatcher.columns_of([A2, B1])
    assert dispatcher.missing(columns) == 0
    assert dispatcher.missing(columns, ["w"]) == 0
    assert dispatcher.missing(columns, ["another"]) == 2
    assert dispatcher.hosts(columns[0]) == 1


def test_requests_of_two_plans_share_the_batches_of_what_both_have() -> None:
    dispatcher = Dispatcher([A1, B1])
    dispatcher.update(state("w", A1, A2, B1))
    old, new = dispatcher.columns_of([A1, B1]), dispatcher.columns_of([A2, B1])
    first = request(old, 0)
    dispatcher.admit(first, LONG_S, 1.0)
    dispatcher.prefer(new, 0.0)
    second = request(new, 1)
    dispatcher.admit(second, LONG_S, 1.0)
    batches = {}
    finished = []
    while found := dispatcher.assign(1.0):
        for batch in found:
            batches[tuple(one.member for one in batch.instances)] = {entry.request for entry in batch.entries}
            dispatcher.take(batch.id, 1.0)
            finished += dispatcher.settle(batch, [0.001] * len(batch.instances))
    assert set(finished) == {first, second}
    assert all(batches[columns] <= {first} for columns in batches if old[0] in columns)
    assert all(batches[columns] <= {second} for columns in batches if new[0] in columns)


def test_a_column_under_way_is_not_dropped() -> None:
    dispatcher = Dispatcher([A1])
    dispatcher.update(state("w", A1))
    gone = request((0,))
    dispatcher.admit(gone, LONG_S, 1.0)
    (batch,) = dispatcher.assign(1.0)
    dispatcher.cancel(gone)
    assert dispatcher.keep_only(set()) == []
    dispatcher.take(batch.id, 2.0)
    assert dispatcher.keep_only(set()) == [0]
    assert list(dispatcher.instances()) == []


@pytest.mark.parametrize("quorum", [1, 2])
def test_expected_members_are_waited_for_whatever_the_quorum(quorum: int) -> None:
    dispatcher = Dispatcher([A1, B1])
    dispatcher.update(state("w", A1, B1))
    columns = dispatcher.columns_of([A2, B1])
    dispatcher.prefer(columns, 0.0)
    dispatcher.expect(columns)
    waiting, late = request(columns, 0, quorum), request(columns, 1, quorum)
    dispatcher.admit(late, 2.0, 1.0)
    dispatcher.admit(waiting, LONG_S, 1.0)
    assert run(dispatcher, 1.0) == []
    assert dispatcher.expire(2.1) == [late]
    assert (late.failure is None) == (quorum == 1)
    dispatcher.update(state("w", A1, A2, B1))
    assert run(dispatcher, 3.0) == [waiting]
    # From now on it is a member like any other: gone is gone.
    dispatcher.update(state("w", A1, B1))
    after = request(columns, 2, quorum)
    dispatcher.admit(after, LONG_S, 4.0)
    assert run(dispatcher, 4.0) == ([after] if quorum == 1 else [])


def test_workers_that_say_goodbye_are_not_counted_against_their_rows() -> None:
    dispatcher = Dispatcher([A1])
    asked = request((0,))
    dispatcher.admit(asked, LONG_S, 1.0)
    for worker in ("u", "v", "w", "x"):
        dispatcher.update(state(worker, A1))
        assert len(dispatcher.assign(1.0)) == 1
        assert dispatcher.lost(worker, blame=False) == []
    dispatcher.update(state("y", A1))
    assert run(dispatcher, 2.0) == [asked]


def test_of_two_batch_sizes_on_a_serial_worker_the_newer_runs() -> None:
    dispatcher = Dispatcher([A1])
    live = (LiveInstance(7, "a", "1", 32, 0.001), LiveInstance(3, "a", "1", 8, 0.001))
    dispatcher.update(State("w", 1, live, True, 2))
    assert [instance.id for _, instance in dispatcher.instances()] == [7]


def test_there_are_columns_for_two_plans_and_no_more() -> None:
    columns = Columns()
    versions = [(f"m{i}", "1") for i in range(MAX_COLUMNS)]
    assert columns.room_for(versions)
    for version in versions:
        columns.add(version)
    assert columns.room_for(versions[:5])
    assert not columns.room_for([("m0", "2")])
    columns.drop([5])
    assert columns.room_for([("m0", "2")])
    assert columns.add(("m0", "2")) == 5
    assert ("m5", "1") not in columns.of
