"""Named cases of rollouts: what is done first, what at once, and what is said where nothing can be done."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from ensemble_operator.rollout.placement import (
    Blocked,
    Cell,
    Done,
    Failed,
    Memory,
    Running,
    Service,
    Step,
    Version,
    Waiting,
    Wanted,
)
from ensemble_operator.rollout.steps import next_step, steps
from tests.unit.rollout.worlds import finished, live, memory, placement, service

ROOMY = memory({"w0": 10, "w1": 10, "w2": 10}, {"a1": 2, "a2": 2, "b1": 3, "b2": 3, "c1": 4})


def shown(step: Step) -> str:
    """`+a2@w0 -a1@w1 | a2 b1`."""
    loads = [f"+{c.member}{c.digest}@{c.worker}" for c in step.loads]
    unloads = [f"-{c.member}{c.digest}@{c.worker}" for c in step.unloads]
    held = " held" if step.service.hold else ""
    return f"{' '.join(loads + unloads)} | {' '.join(m + d for m, d in step.service.versions)}{held}".strip()


def way(running: Running, wanted: Wanted, room: Memory) -> list[str]:
    found, blocked = steps(running, wanted, room)
    assert blocked is None
    return [shown(step) for step in found]


def test_a_first_plan_is_one_step() -> None:
    wanted = Wanted(placement({"w0": "a1 b1", "w1": "a1"}), service("a1 b1"))
    assert way(Running(frozenset(), frozenset(), None), wanted, ROOMY) == ["+a1@w0 +b1@w0 +a1@w1 | a1 b1"]


def test_what_is_as_wanted_is_done() -> None:
    running = live({"w0": "a1 b1"}, service("a1 b1"))
    assert next_step(running, Wanted(running.planned, service("a1 b1")), ROOMY) == Done()


def test_a_new_weight_is_a_switch() -> None:
    running = live({"w0": "a1 b1"}, service("a1 b1", "weights 1 1"))
    wanted = Wanted(running.planned, service("a1 b1", "weights 1 3"))
    assert way(running, wanted, ROOMY) == ["| a1 b1"]


def test_a_replaced_member_is_loaded_everywhere_then_switched_then_unloaded() -> None:
    running = live({"w0": "a1 b1", "w1": "a1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "a2 b1", "w1": "a2"}), service("a2 b1"))
    expected = ["+a2@w0 +a2@w1 | a1 b1", "| a2 b1", "-a1@w0 -a1@w1 | a2 b1"]
    assert way(running, wanted, ROOMY) == expected


def test_members_come_and_go_at_the_switch() -> None:
    running = live({"w0": "a1 b1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "a1 c1"}), service("a1 c1"))
    assert way(running, wanted, ROOMY) == ["+c1@w0 | a1 b1", "| a1 c1", "-b1@w0 | a1 c1"]


def test_a_batch_size_changes_by_loading_first_where_memory_allows() -> None:
    running = live({"w0": "a1x1"}, service("a1"))
    wanted = Wanted(placement({"w0": "a1x8"}), service("a1"))
    assert way(running, wanted, ROOMY) == ["+a1@w0 | a1", "-a1@w0 | a1"]


def test_and_by_unloading_first_where_another_instance_lives() -> None:
    room = memory({"w0": 3, "w1": 3}, {"a1x1": 2, "a1x8": 3})
    running = live({"w0": "a1x1", "w1": "a1x1"}, service("a1"))
    wanted = Wanted(placement({"w0": "a1x8", "w1": "a1x8"}), service("a1"))
    assert way(running, wanted, room) == ["-a1@w0 | a1", "+a1@w0 | a1", "-a1@w1 | a1", "+a1@w1 | a1"]


def test_devices_that_swap_members_do_it_over_a_third() -> None:
    room = memory({"w0": 4, "w1": 4, "w2": 3}, {"a1": 4, "b1": 3, "c1": 3})
    running = live({"w0": "a1", "w1": "b1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "b1", "w1": "a1"}), service("a1 b1"))
    assert way(running, wanted, room) == [
        "+b1@w2 | a1 b1",
        "-b1@w1 | a1 b1",
        "+a1@w1 | a1 b1",
        "-a1@w0 | a1 b1",
        "+b1@w0 | a1 b1",
        "-b1@w2 | a1 b1",
    ]


def test_where_no_third_has_room_the_device_and_what_is_missing_are_named() -> None:
    room = memory({"w0": 4, "w1": 4, "w2": 2}, {"a1": 4, "b1": 3})
    running = live({"w0": "a1", "w1": "b1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "b1", "w1": "a1"}), service("a1 b1"))
    assert next_step(running, wanted, room) == Blocked("w0", "b", 1, 3)
    assert steps(running, wanted, room) == ((), Blocked("w0", "b", 1, 3))
    held = way(running, replace(wanted, pause=True), room)
    assert held == ["| a1 b1 held", "-a1@w0 -b1@w1 | a1 b1 held", "+b1@w0 +a1@w1 | a1 b1 held", "| a1 b1"]


def test_members_are_switched_one_by_one_where_memory_forces_it() -> None:
    room = memory({"w0": 6}, {"a1": 2, "a2": 2, "b1": 2, "b2": 2})
    running = live({"w0": "a1 b1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "a2 b2"}), service("a2 b2"))
    assert way(running, wanted, room) == [
        "+a2@w0 | a1 b1",
        "| a2 b1",
        "-a1@w0 | a2 b1",
        "+b2@w0 | a2 b1",
        "| a2 b2",
        "-b1@w0 | a2 b2",
    ]


def test_what_is_wanted_and_fits_nowhere_is_said_at_once() -> None:
    running = live({"w0": "a1"}, service("a1"))
    wanted = Wanted(placement({"w0": "a1 b1 b2 c1"}), service("a1 b1"))
    assert next_step(running, wanted, ROOMY) == Blocked("w0", "c", 1, 2)


def test_a_version_whose_instances_have_all_failed_is_named() -> None:
    before = live({"w0": "a1 b1"}, service("a1 b1"))
    wanted = Wanted(placement({"w0": "a1 b2", "w1": "b2"}), service("a1 b2"))
    step = next_step(before, wanted, ROOMY)
    assert isinstance(step, Step)
    failed = placement({"w0": "b2"})
    one = Running(step.placement, step.placement - failed, step.service, failed=failed)
    assert isinstance(next_step(one, wanted, ROOMY), Step), "the other instance serves"
    cells = placement({"w0": "b2", "w1": "b2"})
    both = replace(one, live=step.placement - cells, failed=cells)
    assert next_step(both, wanted, ROOMY) == Failed(Version("b", "2"), tuple(sorted(cells)))


def test_what_has_failed_stands_in_for_nobody() -> None:
    room = memory({"w0": 2, "w1": 2, "w2": 2}, {"a1": 2, "b1": 2})
    planned, failed = placement({"w0": "a1", "w1": "a1", "w2": "b1"}), placement({"w1": "a1"})
    running = Running(planned, planned - failed, service("a1 b1"), failed=failed)
    wanted = Wanted(placement({"w0": "b1", "w1": "a1", "w2": "a1"}), service("a1 b1"))
    assert next_step(running, wanted, room) == Blocked("w0", "b", 1, 2), "the only live instance of a1 is on w0"
    room = replace(room, usable_bytes={**room.usable_bytes, "w3": 2})
    step = next_step(running, wanted, room)
    assert isinstance(step, Step)
    assert step.placement >= planned


def test_what_is_under_way_is_waited_for() -> None:
    before = live({"w0": "a1"}, service("a1"))
    wanted = Wanted(placement({"w0": "a2"}), service("a2"))
    step = next_step(before, wanted, ROOMY)
    assert isinstance(step, Step)
    loading = Running(step.placement, before.live, step.service)
    assert next_step(loading, wanted, ROOMY) == Waiting((Cell("w0", "a", "2", 1),), ())
    switch = next_step(finished(before, step), wanted, ROOMY)
    assert isinstance(switch, Step)
    under_former = Running(step.placement, step.placement, switch.service, settled=False)
    assert next_step(under_former, wanted, ROOMY) == Waiting((), ()), "requests may still need the old version"


def test_what_a_gone_worker_held_is_planned_no_more() -> None:
    running = live({"gone": "a1", "w0": "a1"}, service("a1"))
    wanted = Wanted(placement({"w0": "a1", "w1": "a1"}), service("a1"))
    step = next_step(running, wanted, ROOMY)
    assert isinstance(step, Step)
    assert {cell.worker for cell in step.placement} == {"w0", "w1"}


def test_memory_that_is_not_free_yet_is_not_used() -> None:
    room = memory({"w0": 4}, {"a1": 2, "b1": 2, "c1": 2})
    planned = placement({"w0": "a1"})
    lingering = placement({"w0": "b1"})
    running = Running(planned, planned, service("a1"), lingering=lingering)
    wanted = Wanted(placement({"w0": "a1 c1"}), service("a1 c1"))
    assert next_step(running, wanted, room) == Waiting((), tuple(lingering))


def test_half_of_a_version_keeps_serving_while_the_rest_changes() -> None:
    workers = {f"w{i}": 3.0 for i in range(8)}
    room = memory(workers, {"a1x1": 2, "a1x8": 3})
    running = live(dict.fromkeys(workers, "a1x1"), service("a1"))
    wanted = Wanted(placement(dict.fromkeys(workers, "a1x8")), service("a1"))
    found, _ = steps(running, wanted, room)
    assert [(len(step.loads), len(step.unloads)) for step in found] == [(0, 4), (4, 0), (0, 4), (4, 0)]


@pytest.mark.parametrize("changed", ["versions", "places"])
def test_a_thousand_devices_and_64_members_take_a_few_rounds_and_a_second(changed: str) -> None:
    members = [f"m{i}" for i in range(64)]
    workers = [f"w{i}" for i in range(1000)]

    def plan(digest: str, shift: int) -> frozenset[Cell]:
        return frozenset(
            Cell(worker, members[(at + 8 * k + shift) % 64], digest, 8)
            for at, worker in enumerate(workers)
            for k in range(8)
        )

    before = plan("1", 0)
    after = plan("2", 0) if changed == "versions" else plan("1", 4)
    old = Service(tuple(Version(m, "1") for m in members))
    new = Service(tuple(Version(m, next(iter({c.digest for c in after}))) for m in members))
    room = Memory(dict.fromkeys(workers, 9.0), lambda _cell: 1.0, (8,))
    running, wanted = Running(before, before, old), Wanted(after, new)
    began = time.process_time()
    assert isinstance(next_step(running, wanted, room), Step)
    took_s = time.process_time() - began
    found, blocked = steps(running, wanted, room)
    assert blocked is None
    assert len(found) < 20
    assert sum(len(step.loads) for step in found) == 8000
    assert took_s < 5.0, "a second on an idle machine"
