"""The dispatcher by tables of events and effects, with a clock made by hand."""

from __future__ import annotations

import pytest

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.dispatcher import Batch
from ensemble_gateway.queues import Request
from tests.support.dispatch_world import Ledger


def hosting(ledger: Ledger, worker: str, *members: int, size: int = 8, serial: bool = True, first_id: int = 1) -> None:
    """A worker with these members, each taking 10 ms for a row."""
    live = tuple(LiveInstance(first_id + m, *ledger.members[m], size, 0.01 * size) for m in members)
    ledger.update(State(worker, 1, live, serial, 2))


def admitted(ledger: Ledger, rows: int = 1, **wishes: float) -> Request:
    request = ledger.admit(rows, **wishes)  # type: ignore[arg-type]
    assert request is not None
    return request


def given(batches: list[Batch]) -> list[tuple[str, int, int]]:
    """Worker, member and rows of each batch."""
    return [(batch.lane.worker, batch.instance.member, batch.rows) for batch in batches]


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
    batches = {batch.instance.member: batch for batch in ledger.assign()}
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
    assert ledger.answer(next(b for b in batches if b.instance.member == 0), 0.01) == []
    assert ledger.lose("w1") == [request]
    assert request.done == 0b01


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
    poison = next(batch for batch in ledger.assign() if batch.instance.member == 0)
    assert ledger.lose(poison.lane.worker) == []
    (again,) = ledger.assign()
    assert ledger.lose(again.lane.worker) == [request]
    assert request.failure is not None
    assert request.failure.status == 500
    names = f"{poison.lane.worker} and {again.lane.worker}"
    assert request.failure.message == f"member m0: its rows lost two workers, {names}"


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
    assert request.failure.message == f"member m{batch.instance.member}: worker w0: shape mismatch"


def test_a_failed_member_does_not_cost_the_others_their_quorum() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1, serial=False)
    request = admitted(ledger, quorum=1)
    first, second = ledger.assign()
    assert ledger.fail(first, "no memory") == []
    assert ledger.answer(second, 0.01) == [request]
    assert request.failure is None
    assert request.done == 1 << second.instance.member


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


def test_an_instance_that_goes_gives_its_rows_to_another_and_the_others_go_on() -> None:
    ledger = Ledger(2)
    hosting(ledger, "w0", 0, 1, serial=False)
    hosting(ledger, "w1", 1)
    request = admitted(ledger)
    batches = ledger.assign()
    running = {batch.instance.member: batch for batch in batches if batch.lane.worker == "w0"}
    hosting(ledger, "w0", 0)
    assert ledger.dispatcher.in_flight("w0") == 1, "member 0's batch is still there"
    ledger.assign()
    assert ledger.answer(running[0], 0.01) == []
    (other,) = [batch for batch in ledger.running.values() if batch.instance.member == 1]
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


def test_nothing_to_do_has_no_time() -> None:
    ledger = Ledger(1)
    assert ledger.dispatcher.next_at() is None
    hosting(ledger, "w0", 0)
    request = admitted(ledger)
    ledger.answer(ledger.assign()[0], 0.01)
    assert request.closed
    assert ledger.assign() == []
    assert ledger.dispatcher.next_at() is None
