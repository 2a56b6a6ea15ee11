"""What the dispatcher does when workers are lost, change or fail, as tables of events and effects."""

from __future__ import annotations

import pytest

from ensemble_contract.wire import LiveInstance, State
from tests.support.dispatch_ledger import Ledger, admitted, given, hosting, member_of


def test_rows_of_a_lost_worker_are_retried_elsewhere() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    request = admitted(ledger)
    (batch,) = ledger.assign()
    hosting(ledger, "w1", 0)
    assert ledger.lose("w0") == []
    (again,) = ledger.assign()
    assert again.lane.worker == "w1"
    assert ledger.dispatcher.take(batch.id, ledger.now) is None, "its late answer is not wanted"
    assert ledger.answer(again, 0.01) == [request]


def test_rows_that_lose_two_workers_fail_with_both_names() -> None:
    ledger = Ledger(2)
    for worker in ("w0", "w1"):
        hosting(ledger, worker, 0)
        hosting(ledger, f"other-{worker}", 1)
    request = admitted(ledger)
    poison = next(batch for batch in ledger.assign() if member_of(batch) == 0)
    assert ledger.lose(poison.lane.worker) == []
    (again,) = ledger.assign()
    assert ledger.lose(again.lane.worker) == [request]
    assert request.failure is not None
    assert request.failure.status == 500
    names = f"{poison.lane.worker} and {again.lane.worker}"
    assert request.failure.message == f"member m0: its rows lost two workers, {names}"


def test_rows_that_were_given_to_a_worker_that_had_fallen_silent_already_are_not_blamed() -> None:
    """All workers of a node that is gone: the second is given the rows before anybody knows of it."""
    ledger = Ledger(1)
    for worker in ("w0", "w1"):
        hosting(ledger, worker, 0)
    silent_since = ledger.now
    request = admitted(ledger)
    (batch,) = ledger.assign()
    ledger.now += 3.0
    assert ledger.lose(batch.lane.worker, silent_since + 1.0) == []
    (again,) = ledger.assign()
    ledger.now += 0.5
    assert ledger.lose(again.lane.worker, silent_since + 1.0) == []
    hosting(ledger, "w2", 0)
    (last,) = ledger.assign()
    assert ledger.answer(last, 0.01) == [request]


def test_a_batch_that_was_only_queued_behind_a_poisonous_one_is_not_blamed() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0, size=1)
    poison = admitted(ledger)
    ledger.assign()
    ledger.now += 0.006
    innocent = admitted(ledger)
    ledger.assign()
    assert ledger.dispatcher.in_flight("w0") == 2, "the second waits behind the first"
    ledger.lose("w0")
    hosting(ledger, "w1", 0, size=1)
    ledger.assign()
    ledger.now += 0.006
    ledger.assign()
    assert ledger.lose("w1") == [poison]
    hosting(ledger, "w2", 0, size=1)
    (batch,) = ledger.assign()
    assert ledger.answer(batch, 0.01) == [innocent]


def test_innocents_that_shared_a_batch_with_a_poisonous_row_survive() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    requests = [admitted(ledger) for _ in range(6)]
    poison = requests[2]
    assert given(ledger.assign()) == [("w0", 0, 6)]
    ended = ledger.lose("w0")
    for worker in ("w1", "w2"):
        hosting(ledger, worker, 0)
        for _ in range(20):
            ledger.assign()
            batch = next(iter(ledger.running.values()), None)
            if batch is None:
                break
            assert len(batch.entries) == 1, "they are tried apart"
            ledger.now += 0.01
            if batch.entries[0].request is poison:
                ended += ledger.lose(worker)
                break
            ended += ledger.answer(batch, 0.01)
    assert sorted(request.seq for request in ended) == [1, 2, 3, 4, 5, 6]
    assert [request for request in ended if request.failure] == [poison]


def test_a_failed_batch_of_one_request_is_its_failure_with_member_worker_and_cause() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1, serial=False)
    request = admitted(ledger)
    batch = ledger.assign()[0]
    assert ledger.fail(batch, "shape mismatch") == [request], "without a quorum left it does not wait for the others"
    assert request.failure is not None
    assert request.failure.status == 500
    assert request.failure.message == f"member m{member_of(batch)}: worker w0: shape mismatch"


def test_a_failed_member_does_not_cost_the_others_their_quorum() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1, serial=False)
    request = admitted(ledger, quorum=1)
    first, second = ledger.assign()
    assert ledger.fail(first, "no memory") == []
    assert ledger.answer(second, 0.01) == [request]
    assert request.failure is None
    assert request.done == 1 << member_of(second)


def test_a_failed_batch_of_several_requests_is_tried_again_each_alone() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    requests = [admitted(ledger) for _ in range(3)]
    assert ledger.fail(ledger.assign()[0], "no memory") == []
    ended = []
    for _ in range(3):
        ledger.assign()
        batch = next(iter(ledger.running.values()))
        assert len(batch.entries) == 1
        bad = batch.entries[0].request is requests[1]
        ended += ledger.fail(batch, "no memory") if bad else ledger.answer(batch, 0.01)
    assert [bool(request.failure) for request in requests] == [False, True, False]
    assert len(ended) == 3


def test_after_a_lost_device_its_worker_gets_nothing_until_it_says_what_it_has() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    request = admitted(ledger)
    (batch,) = ledger.assign()
    assert ledger.device_lost(batch) == []
    assert ledger.assign() == []
    assert ledger.lose("w0") == [], "the end of its link says nothing new"
    hosting(ledger, "w0", 0, first_id=50)
    (again,) = ledger.assign()
    assert ledger.answer(again, 0.01) == [request]


def test_an_unknown_instance_gets_nothing_more() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1)
    request = admitted(ledger, wanted=0b01)
    (batch,) = ledger.assign()
    assert ledger.unknown(batch) == []
    assert ledger.assign() == []
    assert not ledger.dispatcher.alive(0)
    assert ledger.dispatcher.alive(1)
    hosting(ledger, "w0", 0, 1, first_id=70)
    (again,) = ledger.assign()
    assert ledger.answer(again, 0.01) == [request]


def test_an_unknown_instance_gets_nothing_more_although_it_was_told_again_meanwhile() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0, size=4)
    admitted(ledger)
    (batch,) = ledger.assign()
    hosting(ledger, "w0", 0, size=1)
    assert ledger.unknown(batch) == []
    assert not ledger.dispatcher.alive(0)
    assert ledger.assign() == []


def test_an_instance_that_goes_gives_its_rows_to_another_and_the_others_go_on() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1, serial=False)
    hosting(ledger, "w1", 1)
    request = admitted(ledger)
    batches = ledger.assign()
    running = {member_of(batch): batch for batch in batches if batch.lane.worker == "w0"}
    hosting(ledger, "w0", 0)
    assert ledger.dispatcher.in_flight("w0") == 1, "member 0's batch is still there"
    ledger.assign()
    assert ledger.answer(running[0], 0.01) == []
    (other,) = [batch for batch in ledger.running.values() if member_of(batch) == 1]
    assert other.lane.worker == "w1"
    assert ledger.answer(other, 0.01) == [request]


def test_measurements_outlive_a_new_state() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    for _ in range(30):
        admitted(ledger)
        ledger.answer(ledger.assign()[0], 0.002)
    ((_, before),) = ledger.dispatcher.instances()
    hosting(ledger, "w0", 0)
    ((_, after),) = ledger.dispatcher.instances()
    assert after is before
    assert after.latency.expect(1) == pytest.approx(0.002, rel=0.05)


def test_a_member_of_another_digest_is_not_used() -> None:
    ledger = Ledger(1)
    ledger.update(State("w0", 1, (LiveInstance(1, "m0", "an older digest", 8, 0.1),), True, 2))
    admitted(ledger)
    assert ledger.assign() == []
    assert not ledger.dispatcher.alive(0)


def test_a_worker_is_overdue_when_a_batch_takes_far_longer_than_expected() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0, size=100)
    hosting(ledger, "w1", 0, size=100)
    admitted(ledger, 100)
    slow = {batch.lane.worker: batch for batch in ledger.assign()}
    assert slow["w0"].rows == slow["w1"].rows == 50
    ledger.answer(slow["w1"], 0.5)
    ledger.now += 4.9
    assert ledger.dispatcher.overdue(ledger.now) == [], "under ten times the half second that was expected"
    ledger.now += 0.2
    assert ledger.dispatcher.overdue(ledger.now) == ["w0"]
