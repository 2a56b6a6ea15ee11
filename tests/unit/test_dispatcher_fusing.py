"""Members of one lane that wait with the same rows run as one brief batch: tables of events and effects."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import FUSE_FULL_S, FUSE_S, SHARE_S, fair_share_s
from ensemble_gateway.placement import HORIZON_S
from tests.support.dispatch_ledger import Ledger, admitted, given, given_together, hosting, member_of

TINY_S = 0.00001
ALL = (0, 1, 2, 3)


def ledger_with(*workers: str, members: int = 4, row_s: float = TINY_S, size: int = 8, serial: bool = True) -> Ledger:
    ledger = Ledger(members)
    for index, worker in enumerate(workers):
        hosting(ledger, worker, *range(members), size=size, serial=serial, row_s=row_s, first_id=1 + 100 * index)
    return ledger


def ledger_expecting(batch_s: Sequence[float], *workers: str) -> Ledger:
    """With workers that say how long a full batch of 8 rows takes, by member."""
    ledger = Ledger(len(batch_s))
    for index, worker in enumerate(workers):
        live = tuple(LiveInstance(100 * index + m, *ledger.members[m], 8, s) for m, s in enumerate(batch_s))
        ledger.update(State(worker, 1, live, True, 2))
    return ledger


def test_members_with_the_same_rows_run_as_one_batch_and_all_are_answered_by_it() -> None:
    ledger = ledger_with("w0")
    requests = [admitted(ledger, rows) for rows in (1, 3, 2)]
    (batch,) = ledger.assign()
    assert given_together([batch]) == [("w0", ALL, 6)]
    assert batch.expected_s == pytest.approx(24 * TINY_S)
    assert ledger.dispatcher.in_flight("w0") == 1
    ledger.now += 0.001
    assert ledger.answer(batch, *[TINY_S] * 4) == requests
    assert all(request.failure is None and request.done == 0b1111 for request in requests)


def test_each_member_learns_its_own_time_from_a_batch_of_several() -> None:
    ledger = ledger_with("w0", members=2)
    for _ in range(40):
        admitted(ledger)
        (batch,) = ledger.assign()
        ledger.answer(batch, *[(1 + one.member) * 0.0001 for one in batch.instances])
    expected = {one.member: one.latency.expect(1) for _, one in ledger.dispatcher.instances()}
    assert expected == pytest.approx({0: 0.0001, 1: 0.0002}, rel=0.01)


def test_what_takes_longer_than_the_limit_is_not_added() -> None:
    ledger = ledger_with("w0", row_s=FUSE_S * 0.3)
    admitted(ledger)
    assert [len(members) for _, members, _ in given_together(ledger.assign())] == [3, 1]


def test_a_full_batch_may_take_longer() -> None:
    ledger = ledger_with("w0", row_s=FUSE_FULL_S * 0.3 / 8)
    admitted(ledger, 8)
    assert given_together(ledger.assign()) == [("w0", (0, 1, 2), 8)]
    ledger.now += FUSE_FULL_S - HORIZON_S
    assert given_together(ledger.assign()) == [("w0", (3,), 8)]


def test_a_large_batch_that_is_as_efficient_as_a_full_one_may_take_longer_too() -> None:
    ledger = ledger_with("w0", row_s=FUSE_FULL_S * 0.3 / 7)
    admitted(ledger, 7)
    assert given_together(ledger.assign()) == [("w0", (0, 1, 2), 7)]
    ledger.now += FUSE_FULL_S - HORIZON_S
    assert given_together(ledger.assign()) == [("w0", (3,), 7)]


def test_a_batch_that_more_rows_would_make_more_efficient_may_not() -> None:
    ledger = ledger_with("w0", row_s=FUSE_FULL_S * 0.3 / 7 / 2)
    for _, instance in ledger.dispatcher.instances():
        instance.latency.observe(7, FUSE_FULL_S * 0.3)
    admitted(ledger, 7)
    assert all(len(members) == 1 for _, members, _ in given_together(ledger.assign()))


def test_a_small_batch_may_not() -> None:
    ledger = ledger_with("w0", row_s=FUSE_S * 0.4)
    admitted(ledger)
    assert [len(members) for _, members, _ in given_together(ledger.assign())] == [2, 2]


def test_members_that_take_long_run_by_themselves() -> None:
    ledger = ledger_with("w0", row_s=FUSE_S * 0.51)
    admitted(ledger)
    assert sorted(given(ledger.assign())) == [("w0", 0, 1), ("w0", 1, 1)], "two credits, one batch for each"


def test_lanes_of_a_parallel_worker_run_one_member_each() -> None:
    ledger = ledger_with("gpu", serial=False)
    admitted(ledger)
    assert sorted(given(ledger.assign())) == [("gpu", member, 1) for member in ALL]


def test_only_members_that_wait_with_the_same_rows_run_together() -> None:
    ledger = ledger_with("w0")
    everyone = admitted(ledger)
    first_two = admitted(ledger, wanted=0b0011)
    batches = ledger.assign()
    assert sorted(given_together(batches)) == [("w0", (0, 1), 2), ("w0", (2, 3), 1)]
    by_members = {members: batch for batch in batches for _, members, _ in given_together([batch])}
    assert ledger.answer(by_members[0, 1], TINY_S, TINY_S) == [first_two]
    assert ledger.answer(by_members[2, 3], TINY_S, TINY_S) == [everyone]


def test_a_member_takes_no_part_in_a_batch_over_its_batch_size() -> None:
    ledger = Ledger(3)
    sizes = (8, 8, 4)
    live = tuple(LiveInstance(1 + m, *ledger.members[m], sizes[m], TINY_S * sizes[m]) for m in range(3))
    ledger.update(State("w0", 1, live, True, 4))
    admitted(ledger, 6)
    assert sorted(given_together(ledger.assign())) == [("w0", (0, 1), 6), ("w0", (2,), 3), ("w0", (2,), 3)]


def test_parts_of_a_bulk_request_run_together_while_they_are_divided_alike() -> None:
    ledger = ledger_with("w0", members=2)
    bulk = admitted(ledger, 14)
    first, second = ledger.assign()
    assert given_together([first, second]) == [("w0", (0, 1), 7)] * 2
    assert first.ranges != second.ranges
    assert ledger.answer(second, TINY_S, TINY_S) == []
    assert ledger.answer(first, TINY_S, TINY_S) == [bulk]


def test_rows_that_were_divided_differently_run_apart() -> None:
    ledger = Ledger(2)
    sizes = (8, 4)
    live = tuple(LiveInstance(1 + m, *ledger.members[m], sizes[m], TINY_S * sizes[m]) for m in range(2))
    ledger.update(State("w0", 1, live, True, 8))
    bulk = admitted(ledger, 14)
    batches = ledger.assign()
    assert all(len(batch.instances) == 1 for batch in batches)
    assert sorted(given(batches)) == [("w0", 0, 7)] * 2 + [("w0", 1, 3)] + [("w0", 1, 3)] + [("w0", 1, 4)] * 2
    assert [ledger.answer(batch, TINY_S) for batch in batches][-1] == [bulk]


def test_rows_of_a_request_that_was_closed_run_nowhere() -> None:
    ledger = ledger_with("w0", members=2)
    for _ in range(2):
        admitted(ledger)
        ledger.assign()
    gone, stays = admitted(ledger), admitted(ledger)
    assert ledger.assign() == [], "no credit is left"
    ledger.cancel(gone)
    for batch in list(ledger.running.values()):
        ledger.answer(batch, *[TINY_S] * len(batch.instances))
    batches = ledger.assign()
    assert {entry.request for batch in batches for entry in batch.entries} == {stays}
    assert sorted(one.member for batch in batches for one in batch.instances) == [0, 1]


def test_a_failed_batch_of_several_members_is_tried_again_member_by_member() -> None:
    ledger = ledger_with("w0")
    request = admitted(ledger, quorum=3)
    (batch,) = ledger.assign()
    assert len(batch.instances) == 4
    assert ledger.fail(batch, "no memory") == []
    tried: list[int] = []
    ended = []
    while not request.closed:
        ledger.assign()
        again = next(iter(ledger.running.values()))
        tried.append(member_of(again))
        ended += ledger.fail(again, "shape mismatch") if tried[-1] == 2 else ledger.answer(again, TINY_S)
    assert sorted(tried) == [0, 1, 2, 3]
    assert ended == [request]
    assert request.failure is None
    assert (request.done, request.failed) == (0b1011, 0b0100)
    assert request.causes == {2: "worker w0: shape mismatch"}


def test_what_failed_together_with_others_is_tried_alone_and_what_comes_after_it_together() -> None:
    ledger = ledger_with("w0", members=2)
    admitted(ledger)
    admitted(ledger)
    (batch,) = ledger.assign()
    assert given_together([batch]) == [("w0", (0, 1), 2)]
    ledger.fail(batch, "no memory")
    admitted(ledger)
    seen = []
    for _ in range(6):
        ledger.assign()
        if not ledger.running:
            break
        again = next(iter(ledger.running.values()))
        seen.append((len(again.instances), len(again.entries)))
        ledger.answer(again, *[TINY_S] * len(again.instances))
    assert seen == [(1, 1)] * 4 + [(2, 1)]


def test_a_lost_worker_gives_back_the_rows_of_every_member() -> None:
    ledger = ledger_with("w0")
    request = admitted(ledger)
    (batch,) = ledger.assign()
    hosting(ledger, "w1", *ALL, row_s=TINY_S, first_id=50)
    assert ledger.lose("w0") == []
    assert [ledger.dispatcher.waiting_rows(member) for member in ALL] == [1] * 4
    assert ledger.dispatcher.take(batch.id, ledger.now) is None
    ended = []
    for _ in range(4):
        ledger.assign()
        again = next(iter(ledger.running.values()))
        member_of(again)
        ended += ledger.answer(again, TINY_S)
    assert ended == [request]


def test_of_members_that_lost_a_worker_together_only_the_guilty_one_fails() -> None:
    ledger = ledger_with("w0", members=3)
    request = admitted(ledger, quorum=2)
    ledger.assign()
    ledger.lose("w0")
    hosting(ledger, "w1", 0, 1, 2, row_s=TINY_S, first_id=50)
    while not request.closed:
        ledger.assign()
        again = next(iter(ledger.running.values()))
        if member_of(again) == 1:
            ledger.lose("w1")
            hosting(ledger, "w2", 0, 1, 2, row_s=TINY_S, first_id=90)
        else:
            ledger.answer(again, TINY_S)
    assert request.done == 0b101
    assert request.causes == {1: "its rows lost two workers, w0 and w1"}


def test_a_worker_that_lacks_one_of_a_batchs_instances_is_asked_for_each_by_itself() -> None:
    ledger = ledger_with("w0", members=3)
    request = admitted(ledger, wanted=0b011)
    (batch,) = ledger.assign()
    assert len(batch.instances) == 2
    assert ledger.unknown(batch) == []
    assert all(ledger.dispatcher.alive(member) for member in range(3)), "it did not say which one it lacks"
    first, second = ledger.assign()
    assert given_together([first, second]) == [("w0", (0,), 1), ("w0", (1,), 1)]
    assert ledger.unknown(second) == []
    assert [ledger.dispatcher.alive(member) for member in range(3)] == [True, False, True]
    assert ledger.answer(first, TINY_S) == []
    hosting(ledger, "w0", 0, 1, row_s=TINY_S, first_id=50)
    (again,) = ledger.assign()
    assert ledger.answer(again, TINY_S) == [request]


def test_a_batch_of_several_members_is_given_up_when_one_of_its_instances_goes() -> None:
    ledger = ledger_with("w0", members=2)
    request = admitted(ledger)
    (batch,) = ledger.assign()
    hosting(ledger, "w0", 0, row_s=TINY_S)
    assert ledger.dispatcher.take(batch.id, ledger.now) is None
    (first,) = ledger.assign()
    assert ledger.answer(first, TINY_S) == []
    hosting(ledger, "w0", 0, 1, row_s=TINY_S, first_id=50)
    (second,) = ledger.assign()
    assert [member_of(first), member_of(second)] == [0, 1]
    assert ledger.answer(second, TINY_S) == [request]


def test_idle_lanes_share_members_that_take_long_enough() -> None:
    ledger = ledger_with("w0", "w1", row_s=0.00012)
    admitted(ledger)
    shared = given_together(ledger.assign())
    assert sorted(worker for worker, _, _ in shared) == ["w0", "w1"]
    assert [len(members) for _, members, _ in shared] == [2, 2]


def test_idle_lanes_do_not_share_members_that_are_tiny() -> None:
    ledger = ledger_with("w0", "w1", row_s=0.00002)
    admitted(ledger)
    ((_, members, _),) = given_together(ledger.assign())
    assert members == ALL


def test_where_the_other_lane_is_busy_all_go_to_the_idle_one() -> None:
    ledger = Ledger(5)
    hosting(ledger, "w0", *ALL, row_s=0.00012)
    slow = LiveInstance(104, *ledger.members[4], 8, 0.016)
    others = tuple(LiveInstance(100 + m, *ledger.members[m], 8, 0.00096) for m in ALL)
    ledger.update(State("w1", 1, (*others, slow), True, 2))
    admitted(ledger, wanted=0b10000)
    assert given(ledger.assign()) == [("w1", 4, 1)]
    admitted(ledger, wanted=0b01111)
    assert given_together(ledger.assign()) == [("w0", ALL, 1)]


@pytest.mark.parametrize(
    ("work_s", "lanes", "share_s"),
    [
        (10 * FUSE_S, 1, inf),
        (1.9 * SHARE_S, 2, inf),
        (2 * SHARE_S, 2, SHARE_S),
        (2 * SHARE_S, 1000, SHARE_S),
        (3.8 * SHARE_S, 8, 3.8 * SHARE_S / 3),
        (1.0, 2, 0.5),
        (0.0, 4, inf),
    ],
)
def test_shares_are_equal_and_worth_a_message(work_s: float, lanes: int, share_s: float) -> None:
    assert fair_share_s(work_s, lanes) == pytest.approx(share_s)


def test_parts_stay_equal_where_members_are_not_expected_to_take_quite_the_same() -> None:
    ledger = ledger_expecting([8 * seconds for seconds in (0.00033, 0.00033, 0.00035, 0.00032)], "w0", "w1")
    admitted(ledger, wanted=0b1111)
    assert sorted(len(batch.instances) for batch in ledger.assign()) == [2, 2]


@pytest.mark.parametrize("cheaper", ["w0", "w1"])
def test_parts_stay_equal_where_one_lane_was_given_members_together_and_the_other_apart(cheaper: str) -> None:
    """What each has measured follows from what it was given."""
    ledger = Ledger(4)
    for worker, first in (("w0", 0), ("w1", 100)):
        seconds = 0.0002 if worker == cheaper else 0.0003
        live = tuple(LiveInstance(first + m, *ledger.members[m], 8, 8 * seconds) for m in range(4))
        ledger.update(State(worker, 1, live, True, 2))
    admitted(ledger, wanted=0b1111)
    assert sorted(len(batch.instances) for batch in ledger.assign()) == [2, 2]


@pytest.mark.parametrize("longest", ALL)
def test_parts_of_several_members_lie_side_by_side_in_the_order_of_their_ids(longest: int) -> None:
    """Workers can run neighbours as one, whichever of them has to be first."""
    ledger = ledger_expecting([8 * (0.0003 + 0.00001 * (m == longest)) for m in ALL], "w0", "w1")
    admitted(ledger, wanted=0b1111)
    batches = ledger.assign()
    assert sorted(tuple(one.member for one in batch.instances) for batch in batches) == [(0, 1), (2, 3)]


def test_a_part_that_is_no_equal_share_lies_side_by_side_too() -> None:
    ledger = ledger_expecting([8 * FUSE_S * (0.3 + 0.01 * (m == 3)) for m in ALL], "w0")
    admitted(ledger, wanted=0b1111)
    assert given_together(ledger.assign()) == [("w0", (1, 2, 3), 1), ("w0", (0,), 1)]


def test_a_part_for_which_fewer_fit_than_expected_lies_side_by_side_too() -> None:
    """The first takes less than the others, so that more are expected to fit with it than do."""
    ledger = ledger_expecting([FUSE_FULL_S * (0.24 if m == 3 else 0.27) for m in ALL], "w0")
    admitted(ledger, 8, wanted=0b1111)
    admitted(ledger, 8, wanted=0b1000)
    assert given_together(ledger.assign())[0] == ("w0", (1, 2, 3), 8)
