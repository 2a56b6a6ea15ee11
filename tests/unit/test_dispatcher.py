"""The dispatcher by tables of events and effects, with a clock made by hand."""

from __future__ import annotations

import pytest

from ensemble_contract.wire import LiveInstance, State
from tests.support.dispatch_ledger import Ledger, admitted, given, hosting, member_of


def test_a_request_goes_to_all_its_members_and_is_finished_by_the_last() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0)
    hosting(ledger, "w1", 1)
    request = admitted(ledger)
    first, second = ledger.assign()
    assert sorted(given([first, second])) == [("w0", 0, 1), ("w1", 1, 1)]
    ledger.now += 0.01
    assert ledger.answer(first, 0.01) == []
    assert ledger.answer(second, 0.01) == [request]
    assert request.done == 0b11
    assert request.failure is None


def test_requests_of_one_turn_share_a_batch_and_later_ones_do_not_overtake() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0)
    requests = [admitted(ledger, rows) for rows in (3, 1, 2, 4)]
    (batch,) = ledger.assign()
    assert [entry.request for entry in batch.entries] == requests[:2] + [requests[2]][: len(batch.entries) - 2]
    assert batch.rows == 5, "ten rows are two equal batches, of at most eight"
    assert ledger.dispatcher.waiting_rows(0) == 5


def test_the_oldest_request_comes_first_whatever_its_member_costs() -> None:
    ledger = Ledger(2)
    live = (LiveInstance(1, *ledger.members[0], 8, 0.08), LiveInstance(2, *ledger.members[1], 8, 8.0))
    ledger.update(State("w0", 1, live, True, 2))
    cheap = admitted(ledger, wanted=0b01)
    dear = admitted(ledger, wanted=0b10)
    (first,) = ledger.assign()
    assert ledger.answer(first, 0.01) == [cheap]
    (second,) = ledger.assign()
    assert ledger.answer(second, 1.0) == [dear]


def test_of_one_request_the_member_with_the_most_work_comes_first() -> None:
    ledger = Ledger(2)
    live = (LiveInstance(1, *ledger.members[0], 8, 0.08), LiveInstance(2, *ledger.members[1], 8, 8.0))
    ledger.update(State("w0", 1, live, True, 2))
    admitted(ledger)
    assert given(ledger.assign()) == [("w0", 1, 1)]


def test_one_member_asked_for_alone_needs_only_that_member() -> None:
    ledger = Ledger(3)
    hosting(ledger, "w0", 1)
    request = admitted(ledger, wanted=0b010)
    (batch,) = ledger.assign()
    assert given([batch]) == [("w0", 1, 1)]
    assert ledger.answer(batch, 0.01) == [request]
    assert request.done == 0b010


def test_the_deadline_with_a_quorum_is_an_answer() -> None:
    ledger = Ledger(3)
    hosting(ledger, "w0", 0, 1, 2, serial=False)
    request = admitted(ledger, quorum=2, timeout_s=0.5)
    batches = {member_of(batch): batch for batch in ledger.assign()}
    ledger.answer(batches[0], 0.01)
    assert ledger.answer(batches[2], 0.01) == [], "until the deadline all members are awaited"
    at = ledger.dispatcher.next_at()
    assert at == pytest.approx(ledger.now + 0.5, abs=0.011)
    ledger.now += 0.52
    assert ledger.expire() == [request]
    assert request.failure is None
    assert request.done == 0b101
    assert ledger.answer(batches[1], 0.6) == [], "a late member changes nothing"


def test_the_deadline_without_a_quorum_names_who_is_missing() -> None:
    ledger = Ledger(3)
    hosting(ledger, "w0", 0, 1, 2, serial=False)
    request = admitted(ledger, timeout_s=0.5)
    ledger.answer(ledger.assign()[0], 0.01)
    ledger.now += 0.52
    assert ledger.expire() == [request]
    assert request.failure is not None
    assert request.failure.status == 504
    assert request.failure.message == "1 of the 3 members needed answered in 0.520 s; missing: m1, m2"


def test_the_deadline_with_a_dead_member_is_a_503_that_names_it() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0)
    request = admitted(ledger, timeout_s=0.5)
    ledger.answer(ledger.assign()[0], 0.01)
    assert ledger.dispatcher.alive(0)
    assert not ledger.dispatcher.alive(1)
    ledger.now += 0.52
    assert ledger.expire() == [request]
    assert request.failure is not None
    assert request.failure.status == 503
    assert request.failure.message == "no live instance of m1 after 0.520 s; still waiting for: m1"


def test_with_a_quorum_nobody_waits_for_a_member_that_is_dead() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0)
    request = admitted(ledger, quorum=1)
    assert ledger.answer(ledger.assign()[0], 0.01) == [request]
    assert request.done == 0b01


def test_a_request_that_waits_for_nothing_but_a_lost_member_is_finished_by_the_loss() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0)
    hosting(ledger, "w1", 1)
    request = admitted(ledger, quorum=1)
    batches = ledger.assign()
    assert ledger.answer(next(b for b in batches if member_of(b) == 0), 0.01) == []
    assert ledger.lose("w1") == [request]
    assert request.done == 0b01


def test_rows_of_a_client_that_left_are_not_given_out_and_not_counted_for_long() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0, size=1)
    requests = [admitted(ledger) for _ in range(300)]
    ledger.assign()
    for request in requests[1:-1]:
        ledger.cancel(request)
    assert ledger.dispatcher.waiting_entries(0) == 1
    assert ledger.dispatcher.waiting_rows(0) < 100, "most were swept out although no lane asked"
    ledger.answer(next(iter(ledger.running.values())), 0.01)
    (batch,) = ledger.assign()
    assert batch.entries[0].request is requests[-1]
    assert ledger.answer(batch, 0.01) == [requests[-1]]
    assert ledger.dispatcher.waiting_rows(0) == 0
    assert ledger.allocator.free_slots == ledger.allocator.slots


def test_with_a_delay_rows_wait_for_others_until_the_time_that_it_names() -> None:
    ledger = Ledger(1, max_delay_s=0.02)
    hosting(ledger, "w0", 0)
    admitted(ledger)
    assert ledger.assign() == []
    at = ledger.dispatcher.next_at()
    assert at == pytest.approx(ledger.now + 0.02)
    ledger.now += 0.01
    admitted(ledger)
    assert ledger.assign() == []
    assert ledger.dispatcher.next_at() == at, "the oldest row's wait counts"
    assert at is not None
    ledger.now = at
    assert given(ledger.assign()) == [("w0", 0, 2)], "the wait ends by itself"


def test_a_full_batch_does_not_wait() -> None:
    ledger = Ledger(1, max_delay_s=10.0)
    hosting(ledger, "w0", 0, size=4)
    admitted(ledger, 3)
    assert ledger.assign() == []
    admitted(ledger)
    assert given(ledger.assign()) == [("w0", 0, 4)]


def test_the_next_time_covers_a_lane_that_will_be_free_soon() -> None:
    ledger = Ledger(1)
    hosting(ledger, "w0", 0, size=1)
    admitted(ledger)
    admitted(ledger)
    assert len(ledger.assign()) == 1, "one row runs for 10 ms: too early for the next"
    at = ledger.dispatcher.next_at()
    assert at == pytest.approx(ledger.now + 0.005)
    assert at is not None
    ledger.now = at
    assert len(ledger.assign()) == 1, "the next is there before the lane is free"
    assert ledger.dispatcher.in_flight("w0") == 2


def test_nothing_to_do_has_no_time() -> None:
    ledger = Ledger(1)
    assert ledger.dispatcher.next_at() is None
    hosting(ledger, "w0", 0)
    request = admitted(ledger)
    ledger.answer(ledger.assign()[0], 0.01)
    assert request.closed
    assert ledger.assign() == []
    assert ledger.dispatcher.next_at() is None
