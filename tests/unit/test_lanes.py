"""Latencies that are learnt, and lanes that are given batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.wire import LiveInstance, State
from ensemble_gateway.batches import Batch
from ensemble_gateway.lanes import Instance, Lane, Latency, lanes_of


def make_batch(identity: int, lane: Lane, expected_s: float, now: float) -> Batch:
    return Batch(identity, lane, (lane.instances[0],), [], 1, expected_s, now, 0.0)


def make_lane() -> Lane:
    return Lane("w0", "cpu", 2, {0: Instance(1, 0, 8, Latency(8, 0.08))})


def test_what_was_not_seen_is_in_proportion_to_the_nearest_that_was() -> None:
    latency = Latency(8, 0.08)
    assert latency.expect(1) == pytest.approx(0.01)
    assert latency.expect(1000) == pytest.approx(10)
    latency.observe(1, 0.05)
    assert latency.expect(1) == pytest.approx(0.05)
    assert latency.expect(2) == pytest.approx(0.10), "nearer to 1 than to 8"
    assert latency.expect(4) == pytest.approx(0.04), "nearer to 8"
    assert latency.expect(8) == pytest.approx(0.08)


def test_measurements_converge_and_one_outlier_changes_little() -> None:
    latency = Latency(8, 0.08)
    for _ in range(40):
        latency.observe(8, 0.16)
    assert latency.expect(8) == pytest.approx(0.16, rel=0.01)
    latency.observe(8, 60.0)
    assert latency.expect(8) < 0.16 * 1.7


@pytest.mark.parametrize(("rows", "most_s"), [(1, 0.08), (5, 0.1), (16, 0.16 * 2), (100, 1.0 * 2)])
def test_the_first_batch_of_its_size_is_believed_only_as_far_as_its_neighbours_allow(rows: int, most_s: float) -> None:
    latency = Latency(8, 0.08)
    latency.observe(rows, 30.0)
    assert latency.expect(rows) == pytest.approx(most_s)
    for _ in range(60):
        latency.observe(rows, 3 * most_s)
    assert latency.expect(rows) == pytest.approx(3 * most_s, rel=0.01), "it is learnt when it is seen again"


@pytest.mark.parametrize(("rows", "most_s"), [(4, 0.01), (64, 0.08 * 2)])
def test_what_was_slow_once_is_expected_to_be_quick_again_when_its_neighbours_are(rows: int, most_s: float) -> None:
    latency = Latency(8, 0.01)
    for _ in range(20):
        latency.observe(rows, 5.0)
    assert latency.expect(rows) > 10 * most_s
    latency.observe(8, 0.01)
    assert latency.expect(rows) == pytest.approx(most_s, rel=1e-3)
    assert latency.expect(8) == pytest.approx(0.01)


def test_a_profile_of_nothing_is_corrected_by_the_first_measurements() -> None:
    latency = Latency(8, 0.0)
    assert latency.expect(8) == 0
    for _ in range(20):
        latency.observe(8, 0.08)
    assert latency.expect(8) == pytest.approx(0.08, rel=0.02)


@given(
    st.integers(1, 1 << 24), st.floats(1e-6, 100), st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(1e-6, 100)))
)
def test_expectations_are_positive_whatever_was_measured(
    rows: int, seconds: float, measured: list[tuple[int, float]]
) -> None:
    latency = Latency(rows, seconds)
    for seen_rows, seen_s in measured:
        latency.observe(seen_rows, seen_s)
    for asked in (1, 7, rows, 1 << 32):
        assert latency.expect(asked) > 0


def test_the_backlog_is_what_its_batches_are_expected_to_take() -> None:
    lane = make_lane()
    assert lane.backlog(10.0) == 0
    first, second = make_batch(1, lane, 0.1, 10.0), make_batch(2, lane, 0.3, 10.0)
    lane.start(first, 10.0)
    lane.start(second, 10.0)
    assert lane.backlog(10.0) == pytest.approx(0.4)
    assert lane.backlog(10.1) == pytest.approx(0.3)
    lane.finish(first, 10.2)
    assert lane.backlog(10.2) == pytest.approx(0.3), "what is late moves what comes after it"
    assert lane.backlog(10.7) == pytest.approx(0.2), "late by 0.2, and expected to be late by as much again"
    lane.finish(second, 10.8)
    assert lane.backlog(10.9) == 0


def test_a_lane_is_overdue_by_its_oldest_batch_since_it_could_begin() -> None:
    lane = make_lane()
    first, second = make_batch(1, lane, 0.4, 10.0), make_batch(2, lane, 0.4, 10.0)
    lane.start(first, 10.0)
    lane.start(second, 10.0)
    assert not lane.overdue(13.9)
    assert lane.overdue(14.1)
    lane.finish(first, 14.1)
    assert not lane.overdue(18.0)
    assert lane.overdue(18.2)
    lane.finish(second, 18.2)
    assert not lane.overdue(100.0)


def test_a_short_batch_has_three_seconds() -> None:
    lane = make_lane()
    lane.start(make_batch(1, lane, 0.001, 10.0), 10.0)
    assert not lane.overdue(12.9)
    assert lane.overdue(13.1)


MEMBERS = {("a", "1"): 0, ("b", "2"): 1}
LIVE = (
    LiveInstance(7, "a", "1", 8, 0.1),
    LiveInstance(8, "b", "2", 4, 0.1),
    LiveInstance(9, "b", "other", 4, 0.1),
    LiveInstance(10, "c", "3", 4, 0.1),
)


def test_a_serial_worker_is_one_lane_of_the_members_that_are_served() -> None:
    (lane,) = lanes_of(State("w", 1, LIVE, True, 2, device_class="cpu-4"), MEMBERS, {})
    assert {member: (i.id, i.batch_size) for member, i in lane.instances.items()} == {0: (7, 8), 1: (8, 4)}
    assert (lane.worker, lane.credits, lane.device_class) == ("w", 2, "cpu-4")


def test_a_parallel_worker_has_a_lane_for_each_instance() -> None:
    lanes = lanes_of(State("w", 1, LIVE, False, 2), MEMBERS, {})
    assert [list(lane.instances) for lane in lanes] == [[0], [1]]


def test_a_worker_without_anything_that_is_served_has_no_lane() -> None:
    assert lanes_of(State("w", 1, LIVE[2:], True, 2), MEMBERS, {}) == []
    assert lanes_of(State("w", 1, (), False, 2), MEMBERS, {}) == []


@pytest.mark.parametrize(
    ("known", "kept"),
    [
        (Instance(7, 0, 8, Latency(8, 0.5)), True),
        (Instance(7, 0, 16, Latency(16, 0.5)), False),
        (Instance(7, 1, 8, Latency(8, 0.5)), False),
    ],
)
def test_an_instance_is_the_same_only_with_the_same_member_and_batch_size(known: Instance, kept: bool) -> None:
    (lane,) = lanes_of(State("w", 1, LIVE[:1], True, 2), MEMBERS, {7: known})
    assert (lane.instances[0] is known) == kept


def test_a_lane_takes_over_batches_whose_instance_still_lives() -> None:
    old = Lane("w", "cpu", 2, {0: Instance(1, 0, 8, Latency(8, 0.1)), 1: Instance(2, 1, 8, Latency(8, 0.1))})
    kept = Batch(1, old, (old.instances[0],), [], 1, 0.5, 10.0, 0.0)
    gone = Batch(2, old, (old.instances[1],), [], 1, 0.5, 10.0, 0.0)
    for batch in (kept, gone):
        old.start(batch, 10.0)
    old.freed_at = 9.5
    new = Lane("w", "cpu", 2, {0: old.instances[0]})
    new.inherit(old)
    assert list(new.batches) == [1]
    assert kept.lane is new
    assert gone.lane is old
    assert (new.busy_until, new.freed_at) == (old.busy_until, 9.5)


def test_a_batch_of_several_members_is_taken_over_only_with_all_its_instances() -> None:
    old = Lane("w", "cpu", 2, {m: Instance(1 + m, m, 8, Latency(8, 0.1)) for m in range(3)})
    first, second, third = old.instances.values()
    kept = Batch(1, old, (first, third), [], 1, 0.5, 10.0, 0.0)
    gone = Batch(2, old, (first, second), [], 1, 0.5, 10.0, 0.0)
    for batch in (kept, gone):
        old.start(batch, 10.0)
    new = Lane("w", "cpu", 2, {0: first, 2: third})
    new.inherit(old)
    assert list(new.batches) == [1]
    assert gone.lane is old
