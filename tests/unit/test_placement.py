"""Which lane is offered a member's rows: tables of lanes and what is expected of the choice."""

from __future__ import annotations

from math import inf

import pytest

from ensemble_gateway.batches import Batch
from ensemble_gateway.lanes import Instance, Lane, Latency
from ensemble_gateway.placement import FEW, HORIZON_S, Lanes, Offer

NOW = 10.0


def lane_of(name: str, row_s: float = 0.01, *, members: int = 1, size: int = 64, device_class: str = "cpu") -> Lane:
    instances = {member: Instance(member, member, size, Latency(size, size * row_s)) for member in range(members)}
    return Lane(name, device_class, 2, instances)


def lanes_with(*lanes: Lane, members: int = 1) -> Lanes:
    found = Lanes(members)
    for lane in lanes:
        found.replace(lane.worker, [lane])
    return found


_ids = iter(range(1, 1 << 30))


def busy(lanes: Lanes, lane: Lane, seconds: float) -> Batch:
    batch = Batch(next(_ids), lane, (next(iter(lane.instances.values())),), [], 1, seconds, NOW, 0.0)
    lanes.start(batch, NOW)
    return batch


def chosen(offer: Offer | None) -> tuple[str, int] | None:
    return None if offer is None else (offer[0].worker, offer[2])


@pytest.mark.parametrize(
    ("waiting", "speeds", "backlogs", "expected"),
    [
        (1, (0.01, 0.01), (0, 0), ("w0", 1)),
        (1, (0.03, 0.01), (0, 0), ("w1", 1)),
        (1, (0.03, 0.01), (0, 0.004), ("w1", 1)),
        (1, (0.03, 0.01), (0, 0.011), None),
        (1, (0.03, 0.01), (0, 0.015), ("w0", 1)),
        (1, (0.01, 0.01), (0, 0.5), ("w0", 1)),
        (2, (0.01, 0.01), (0, 0), ("w0", 1)),
        (40, (0.01, 0.01), (0, 0), ("w0", 20)),
        (40, (0.01, 0.01), (0, 0.2), ("w0", 30)),
        (40, (0.03, 0.01), (0, 0), ("w1", 30)),
        (40, (0.03, 0.01), (0, 0.3), ("w0", 17)),
        (300, (0.01, 0.01), (0, 0), ("w0", 50)),
        (3, (1.0, 0.01), (0, 0.02), None),
        (20, (0.00001, 0.00001), (0, 0), ("w0", 20)),
        (64, (0.000012, 0.000012), (0, 0.0007), ("w0", 64)),
        (64, (0.000012, 0.000012), (0, 0.0001), ("w0", 37)),
        (64, (0.000012, 0.000008), (0, 0.5), ("w0", 64)),
        (15, (0.00003, 0.00001), (0, 0.0002), ("w1", 15)),
        (28, (0.00003, 0.00001), (0, 0.0002), ("w1", 28)),
        (60, (0.00003, 0.00001), (0, 0.0005), ("w1", 60)),
    ],
    ids=str,
)
def test_a_choice_between_two(
    waiting: int, speeds: tuple[float, float], backlogs: tuple[float, float], expected: tuple[str, int] | None
) -> None:
    pair = [lane_of(f"w{index}", row_s) for index, row_s in enumerate(speeds)]
    lanes = lanes_with(*pair)
    for lane, seconds in zip(pair, backlogs, strict=True):
        if seconds:
            busy(lanes, lane, seconds)
    assert chosen(lanes.offer(0, waiting, 1.0, NOW)) == expected


def test_where_more_work_waits_the_rows_of_one_member_stay_together() -> None:
    lanes = lanes_with(lane_of("w0", members=2), lane_of("w1", members=2), members=2)
    assert chosen(lanes.offer(0, 40, 0.5, NOW)) == ("w0", 40)
    assert chosen(lanes.offer(0, 40, 0.8, NOW)) == ("w0", 25)


def test_slow_lanes_do_not_share_what_is_too_little_for_each() -> None:
    lanes = lanes_with(lane_of("w0", 0.00003), lane_of("w1", 0.00003), lane_of("fast", 0.00001))
    for lane in lanes.by_worker["fast"]:
        busy(lanes, lane, 0.5)
    assert chosen(lanes.offer(0, 6, 1.0, NOW)) == ("w0", 6)
    assert chosen(lanes.offer(0, 60, 1.0, NOW)) == ("w0", 30)


def test_a_part_that_would_cost_its_device_too_much_is_not_made() -> None:
    pair = [lane_of("w0"), lane_of("w1")]
    for lane in pair:
        for rows in (8, 16, 32, 64):
            lane.instances[0].latency = Latency(rows, 0.05) if rows == 8 else lane.instances[0].latency
            lane.instances[0].latency.observe(rows, 0.05)
    lanes = lanes_with(*pair)
    assert chosen(lanes.offer(0, 32, 1.0, NOW)) == ("w0", 16), "half as well, but no worse"
    lanes = lanes_with(*(lane_of(f"w{index}") for index in range(4)))
    for lane_list in lanes.by_worker.values():
        latency = lane_list[0].instances[0].latency = Latency(8, 0.05)
        for rows in (1, 2, 4, 16, 32, 64):
            latency.observe(rows, 0.05)
    for hosts in lanes.hosts:
        hosts.few = [(lane, lane.instances[0]) for lane, _ in hosts.few]
    assert chosen(lanes.offer(0, 32, 1.0, NOW)) == ("w0", 32), "a batch takes as long whatever its rows"


def test_members_are_compared_by_what_all_lanes_of_a_class_have_measured() -> None:
    cpus = [lane_of("w0", members=2), lane_of("w1", members=2)]
    gpu = lane_of("gpu", 0.001, members=2, device_class="gpu")
    lanes = lanes_with(*cpus, gpu, members=2)
    for _ in range(60):
        lanes.observe(cpus[1], cpus[1].instances[0], 64, 0.32)
        lanes.observe(gpu, gpu.instances[0], 64, 0.032)
    counted = [lanes.hosts[0].work_s(lane, lane.instances[0], 64) for lane in (*cpus, gpu)]
    assert counted == pytest.approx([0.32, 0.32, 0.032], rel=0.01)
    assert cpus[0].instances[0].latency.expect(64) == pytest.approx(0.64), "its own is what it has measured itself"
    lanes.replace("w0", [])
    lanes.replace("w1", [])
    assert lanes.hosts[0].work_s(gpu, gpu.instances[0], 64) == pytest.approx(0.032, rel=0.01)
    lanes.replace("gpu", [])
    assert lanes.hosts[0].reference is None


def test_rows_that_wait_for_a_busy_lane_count_as_its_work_until_the_round_ends() -> None:
    slow, fast = lane_of("slow", 0.10, members=4), lane_of("fast", 0.03, members=4)
    lanes = lanes_with(slow, fast, members=4)
    busy(lanes, fast, 0.01)
    assert [chosen(lanes.offer(member, 1, 0.25, NOW)) for member in range(3)] == [None, None, ("slow", 1)]
    lanes.end_round()
    assert chosen(lanes.offer(2, 1, 0.25, NOW)) is None


def test_a_lane_opens_shortly_before_it_is_free_and_closes_without_credit() -> None:
    lane = lane_of("w0")
    lanes = lanes_with(lane)
    assert (lanes.alive, lanes.open) == (1, 1)
    busy(lanes, lane, 0.1)
    assert lanes.open == 0
    assert lanes.next_opening() == pytest.approx(NOW + 0.1 - HORIZON_S)
    lanes.ripen(NOW + 0.05)
    assert lanes.open == 0
    lanes.ripen(lanes.next_opening())
    assert lanes.open == 1
    assert lanes.next_opening() == inf
    batch = busy(lanes, lane, 0.1)
    assert lanes.open == 0, "two batches are all its credit"
    assert lanes.next_opening() == inf
    lanes.finish(batch, NOW + 0.1)
    lanes.ripen(NOW + 0.2)
    assert lanes.open == 1


def test_the_lane_of_a_worker_that_goes_is_offered_nothing() -> None:
    lane = lane_of("w0")
    lanes = lanes_with(lane, lane_of("w1"))
    busy(lanes, lane, 0.1)
    assert lanes.replace("w0", []) == [lane]
    assert lanes.replace("w0", []) == []
    assert lanes.next_opening() == inf, "nobody needs to wake up for it"
    assert chosen(lanes.offer(0, 1, 1.0, NOW)) == ("w1", 1)
    lanes.replace("w1", [])
    assert (lanes.alive, lanes.open) == (0, 0)
    assert lanes.offer(0, 1, 1.0, NOW) is None
    lanes.ripen(NOW + 1)
    assert lanes.open == 0


def test_an_instance_that_does_not_exist_leaves_the_others_of_its_lane() -> None:
    lane = lane_of("w0", members=2)
    lanes = lanes_with(lane, members=2)
    lanes.drop(lane, lane.instances[0])
    assert (lanes.alive, lanes.open) == (0b10, 0b10)
    lanes.drop(lane, Instance(99, 1, 8, Latency(8, 0.1)))
    assert lanes.alive == 0b10, "another instance of the same member is not meant"


@pytest.mark.parametrize(("others", "counted"), [(0, 0), (1, 1), (FEW - 1, FEW - 1), (5 * FEW, FEW - 1)])
def test_idle_lanes_beside_one_are_those_without_a_batch_that_run_the_member(others: int, counted: int) -> None:
    own, working = lane_of("own", 0.0001, members=2), lane_of("working", 0.0001, members=2)
    rest = [lane_of(f"w{index}", 0.0001) for index in range(others)]
    lanes = lanes_with(own, *rest, members=2)
    assert lanes.idle_beside(own, 0) == counted
    assert lanes.idle_beside(own, 1) == 0
    lanes.replace("working", [working])
    busy(lanes, working, 0.0001)
    assert working.open, "it may be given another batch, but is not idle"
    assert lanes.idle_beside(own, 0) == counted
    assert lanes.idle_beside(own, 1) == 0


def test_among_many_equal_lanes_every_idle_one_gets_its_part() -> None:
    many = [lane_of(f"w{index}") for index in range(5 * FEW)]
    lanes = lanes_with(*many)
    seen = set()
    waiting = 2 * len(many)
    while waiting:
        offer = lanes.offer(0, waiting, 1.0, NOW)
        assert offer is not None
        assert offer[2] == 2
        seen.add(offer[0].worker)
        busy(lanes, offer[0], 0.001)
        waiting -= 2
    assert len(seen) == len(many), "although one with a short batch stays open"


def test_among_many_unequal_classes_the_fast_ones_come_first_and_the_slow_take_no_odd_row() -> None:
    slow = [lane_of(f"cpu{index}", 1.0, device_class="cpu") for index in range(2 * FEW)]
    fast = [lane_of(f"gpu{index}", 0.01, device_class="gpu") for index in range(2 * FEW)]
    lanes = lanes_with(*slow, *fast)
    for _ in fast:
        offer = lanes.offer(0, 20, 1.0, NOW)
        assert offer is not None
        assert offer[0].device_class == "gpu"
        busy(lanes, offer[0], 0.1)
    assert lanes.offer(0, 20, 1.0, NOW) is None, "the fast ones are done sooner, busy as they are"
    many = lanes.offer(0, 100_000, 1.0, NOW)
    assert many is not None
    assert many[0].device_class == "cpu", "but with a minute of work the slow ones help"
