"""What there is to plan, and when a new plan is worth a change."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from ensemble_contract.errors import PlanTooLarge
from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.control.book import Book
from ensemble_operator.control.planner import Planner, PlannerFailed
from ensemble_operator.control.planning import (
    AWAY_GRACE_S,
    UNSCHEDULABLE_GRACE_S,
    Members,
    answered,
    live_devices,
    members_to_serve,
    need_bytes,
    overheads_of,
    question,
    target_of,
    tensors_of,
    wanted_sources,
)
from ensemble_operator.control.profiling import measured
from ensemble_operator.control.questions import DOES_NOT_FIT, PlanAnswer, PlanQuestion
from ensemble_operator.control.stepping import goal_of, is_settled, memory_of, running_of
from ensemble_operator.control.target import HASH_ANNOTATION, Mirror, Target, TargetDevice, read_mirror, write_mirror
from ensemble_operator.errors import InvalidSpec
from ensemble_operator.fleet import DeviceReport
from ensemble_operator.rollout.placement import Cell
from tests.unit.control.ensembles import CLASS, MIB, ensemble, gateway, observed, pod, profiled, worker

TWO = ensemble(members=[profiled("a"), profiled("b", latency="2ms")])
SOURCES = wanted_sources(TWO)
DEVICE = TargetDevice(CLASS, "cpu", 1024 * MIB, 700 * MIB)
DEVICES = {"w0": DEVICE, "w1": DEVICE}
ADDRESSES = {"w0": "tcp://h0:1", "w1": "tcp://h1:1"}


def everything(served: Members | None = None) -> tuple[Members, PlanQuestion]:
    members = served or members_to_serve(TWO, {}, None)
    found = measured(TWO, members.sources, [CLASS], Book(), 0.0)
    return members, question(TWO, members, DEVICES, found, ())


def test_what_is_profiled_at_none_of_the_specs_batch_sizes_is_named() -> None:
    other = ensemble(members=[profiled("a"), profiled("b")], batching={"sizes": [4, 16]})
    members = members_to_serve(other, {}, None)
    with pytest.raises(InvalidProblem) as refusal:
        question(other, members, DEVICES, measured(other, members.sources, [CLASS], Book(), 0.0), ())
    assert "member 'a' is profiled at batch sizes 1, none of which is in the spec's batching.sizes (4, 16)" in str(
        refusal.value
    )


def answer(*cells: tuple[str, str, int], predicted: float = 100.0, running: float = 0.0) -> PlanAnswer:
    return PlanAnswer(cells, predicted, 2 * predicted, "because", running)


CELLS = (("w0", "a", 1), ("w1", "b", 1))


def a_plan(target: Target, generation: int = 3) -> EnsemblePlan:
    members, _ = everything()
    goal = goal_of(TWO, members, tensors_of(TWO, members.sources, Book()), target, ADDRESSES, 1 << 20)
    return msgspec.structs.replace(goal, gateway=msgspec.structs.replace(goal.gateway, generation=generation))


def test_only_what_matters_makes_another_question() -> None:
    _, asked = everything()
    again = msgspec.structs.replace(asked, running=CELLS)
    assert again.identity == asked.identity
    assert msgspec.structs.replace(asked, versions=("x", "y")).identity != asked.identity


def test_a_plan_that_is_hardly_better_changes_nothing() -> None:
    _, asked = everything()
    first = target_of(asked, answer(*CELLS), DEVICES, None)
    other = (("w0", "b", 1), ("w1", "a", 1))
    hardly = target_of(asked, answer(*other, predicted=104, running=100), DEVICES, first)
    assert hardly.rows == first.rows
    assert hardly.examined == asked.identity
    better = target_of(asked, answer(*other, predicted=106, running=100), DEVICES, first)
    assert better.rows != first.rows
    unusable = target_of(asked, answer(*other, predicted=50, running=0), DEVICES, first)
    assert unusable.rows == better.rows
    fewer = question(
        TWO, members_to_serve(TWO, {}, None), {"w0": DEVICE}, measured(TWO, SOURCES, [CLASS], Book(), 0), ()
    )
    lost = target_of(fewer, answer(("w0", "a", 1), ("w0", "b", 1), predicted=50, running=100), DEVICES, first)
    assert set(lost.rows) == {"w0"}


def test_a_version_that_returns_is_planned_as_that_version() -> None:
    """Its question was answered before another version was found to do as well on the same matrix."""

    def asked_for(version: str) -> tuple[Members, PlanQuestion]:
        two = ensemble(members=[profiled("a", version=version), profiled("b")])
        members = members_to_serve(two, {}, None)
        return members, question(two, members, DEVICES, measured(two, members.sources, [CLASS], Book(), 0.0), ())

    (first, one), (_, two) = asked_for("1"), asked_for("2")
    target = target_of(one, answer(*CELLS), DEVICES, None)
    assert answered(two, target) is None
    changed = target_of(two, answer(*CELLS, predicted=100, running=100), DEVICES, target)
    assert (changed.rows, changed.digests == target.digests) == (target.rows, False)
    assert answered(two, changed) == changed
    back = answered(one, changed)
    assert back is not None
    assert (back.rows, back.digests, back.examined) == (target.rows, target.digests, one.identity)
    goal = goal_of(TWO, first, tensors_of(TWO, first.sources, Book()), back, ADDRESSES, 0)
    assert goal.rows == {"w0": ((0, 1),), "w1": ((1, 1),)}
    assert answered(one, None) is None


def test_what_cannot_be_loaded_leaves_what_runs() -> None:
    first = members_to_serve(TWO, {"a": "gone"}, None)
    assert dict(first.unplaced) == {"a": "gone"}
    assert list(first.sources) == ["a", "b"]
    _, asked = everything(first)
    assert [member.name for member in asked.problem.members] == ["b"]
    _, whole = everything()
    running = a_plan(target_of(whole, answer(*CELLS), DEVICES, None))
    replaced = ensemble(members=[profiled("a", version="2"), profiled("b"), profiled("c")])
    now = members_to_serve(replaced, {"a": "broken", "c": "broken too"}, running)
    assert dict(now.kept) == {"a": "broken"}
    assert dict(now.left_out) == {"c": "broken too"}
    assert now.sources["a"] == SOURCES["a"]
    assert list(now.sources) == ["a", "b"]


def test_a_goal_without_a_member_that_is_left_out_has_a_quorum_that_can_be_met() -> None:
    members = Members({"b": SOURCES["b"]}, {}, {}, {"a": "broken"})
    _, asked = everything(members)
    target = target_of(asked, answer(("w0", "b", 1)), DEVICES, None)
    goal = goal_of(TWO, members, tensors_of(TWO, members.sources, Book()), target, ADDRESSES, 0)
    assert (goal.gateway.quorum, [m.name for m in goal.gateway.members]) == (1, ["b"])
    assert goal.rows == {"w0": ((0, 1),), "w1": ()}


def test_a_worker_keeps_its_place_for_a_while() -> None:
    _, asked = everything()
    target = target_of(asked, answer(*CELLS), {"w0": DEVICE, "w1": DEVICE}, None)
    here = worker("w0")
    silent = worker("w1", pod=pod("w1", ready=False, away_since=100.0), device=None, report=None)
    seen = observed([here, silent], mirror=Mirror(None, target))
    overheads = {CLASS: 100 * MIB}
    assert set(live_devices(TWO, seen, overheads, 101.0)) == {"w0", "w1"}
    assert set(live_devices(TWO, seen, overheads, 101.0 + AWAY_GRACE_S)) == {"w0"}
    slow = worker("w1", device=None, report=None)
    assert set(live_devices(TWO, observed([here, slow], mirror=Mirror(None, target)), overheads, 9e9)) == {"w0", "w1"}
    nowhere = pod("w1", ready=False, away_since=100.0, created=100.0, unschedulable="no node has room")
    unplaced = observed([here, worker("w1", pod=nowhere, device=None, report=None)], mirror=Mirror(None, target))
    assert set(live_devices(TWO, unplaced, overheads, 101.0)) == {"w0", "w1"}
    assert set(live_devices(TWO, unplaced, overheads, 101.0 + UNSCHEDULABLE_GRACE_S)) == {"w0"}
    blind = worker("w1", device=DeviceReport("cuda-0", "none", "", 0, error="no GPU"))
    assert set(live_devices(TWO, observed([here, blind], mirror=Mirror(None, target)), overheads, 101.0)) == {"w0"}
    gone = observed([here], mirror=Mirror(None, target))
    assert set(live_devices(TWO, gone, overheads, 101.0)) == {"w0"}
    leaving = observed([worker("w0", pod=pod("w0", leaving_since=90.0))])
    assert live_devices(TWO, leaving, overheads, 101.0) == {}


def test_headroom_overhead_and_the_row_cache_are_taken_off() -> None:
    seen = observed([worker("w0"), worker("x0", pod=pod("x0", pool=1))])
    two_pools = ensemble(
        extraDevices=[{"count": 1, "resource": "cpu", "cores": "1", "memory": "1Gi", "memoryHeadroom": "50%"}]
    )
    found = live_devices(two_pools, seen, {CLASS: 100 * MIB}, 0.0)
    cache = 1024 * MIB // 16
    assert found["w0"].usable_bytes == int(1024 * MIB * 0.9) - 100 * MIB - cache
    assert found["x0"].usable_bytes == 512 * MIB - 100 * MIB - cache
    blind = worker("w2", device=DeviceReport("cuda-0", "none", "", 0, error="no GPU"))
    assert live_devices(TWO, observed([blind]), {}, 0.0) == {}


def test_memory_is_that_of_the_profile_else_what_the_worker_says() -> None:
    members, _ = everything()
    found = measured(TWO, members.sources, [CLASS], Book(), 0.0)
    needs = need_bytes(members, found, Book(), observed([worker("w0")]))
    memory = memory_of(DEVICES, needs)
    assert memory.need_bytes(Cell("w0", "a", SOURCES["a"].digest, 1)) == 64 * MIB
    assert memory.need_bytes(Cell("w0", "a", "unknown", 1)) == float("inf")
    assert overheads_of([CLASS], found)[CLASS] == 512 * MIB


def test_the_mirror_holds_what_was_written_and_nothing_that_was_edited() -> None:
    _, asked = everything()
    target = target_of(asked, answer(*CELLS), DEVICES, None)
    plan = a_plan(target)
    data, annotations = write_mirror(plan, target)
    stored = {"metadata": {"annotations": annotations}, "data": data}
    assert read_mirror(stored) == Mirror(plan, target)
    assert target.cells() == CELLS
    edited = {**stored, "data": {name: text.replace("a.pt2", "evil.pt2") for name, text in data.items()}}
    assert read_mirror(edited) == Mirror()
    assert read_mirror({**stored, "metadata": {"annotations": {HASH_ANNOTATION: "x"}}}) == Mirror()
    assert read_mirror(None) == Mirror()


def test_a_thousand_devices_fit_into_the_mirror() -> None:
    many = {f"imagenet-worker-{n}": DEVICE for n in range(1000)}
    members = members_to_serve(TWO, {}, None)
    asked = question(TWO, members, many, measured(TWO, members.sources, [CLASS], Book(), 0.0), ())
    target = target_of(asked, answer(*((w, m, 1) for w in many for m in "ab")), many, None)
    addresses = {w: f"tcp://{w}.imagenet-worker.a-namespace.svc:5555" for w in many}
    goal = goal_of(TWO, members, tensors_of(TWO, members.sources, Book()), target, addresses, 0)
    data, _ = write_mirror(goal, target)
    assert sum(map(len, data.values())) < 1 << 20


def test_a_matrix_that_no_config_map_holds_is_too_large() -> None:
    _, asked = everything()
    target = target_of(asked, answer(*CELLS), DEVICES, None)
    vast = msgspec.structs.replace(target, rows={f"imagenet-worker-{n}": ((0, 1),) for n in range(10_000)})
    with pytest.raises(PlanTooLarge, match=r"the matrix has \d+ bytes as JSON, over the limit of 120000"):
        write_mirror(a_plan(target), vast)


def test_settled_means_every_gateway_that_may_have_clients() -> None:
    assert is_settled(observed(gateways=[gateway(3)]), 3)
    assert not is_settled(observed(gateways=[gateway(3), gateway(2)]), 3)
    assert not is_settled(observed(gateways=[gateway(3, retiring=1)]), 3)
    assert not is_settled(observed(gateways=[gateway(3), gateway(3, state=None)]), 3)
    starting = gateway(3, state=None, pod=pod("tiny-gateway-y", ready=False))
    assert is_settled(observed(gateways=[gateway(3), starting]), 3)


def test_a_lost_plan_is_what_workers_still_run() -> None:
    _, asked = everything()
    goal = a_plan(target_of(asked, answer(*CELLS), DEVICES, None))
    digest = SOURCES["a"].digest
    seen = observed([worker("w0", ("a", digest, 1, "ready"), ("z", "old", 1, "ready"))])
    running = running_of(seen, goal)
    assert running.planned == running.live == {Cell("w0", "a", digest, 1)}
    assert running.lingering == {Cell("w0", "z", "old", 1)}
    assert running.service is None


def test_a_plan_from_a_backup_is_a_lost_one() -> None:
    _, asked = everything()
    target = target_of(asked, answer(*CELLS), DEVICES, None)
    goal = a_plan(target, generation=3)
    running = worker("w0", ("a", SOURCES["a"].digest, 1, "ready"))
    assert running_of(observed([running], [gateway(3)], Mirror(goal, target)), goal).service is not None
    stale = running_of(observed([running], [gateway(4)], Mirror(goal, target)), goal)
    assert stale.service is None
    assert stale.planned == {Cell("w0", "a", SOURCES["a"].digest, 1)}


def test_tensors_that_nobody_tells_are_a_fault_of_the_resource() -> None:
    untold = ensemble("a", inputs=False)
    with pytest.raises(InvalidSpec, match=r"spec\.input: is not given"):
        tensors_of(untold, wanted_sources(untold), Book())


async def test_the_planning_process_answers_is_kept_warm_and_ends_when_idle() -> None:
    _, asked = everything()
    planner = Planner(idle_s=3.0)
    try:
        first = await planner.plan(asked)
        assert {(member, size) for _, member, size in first.cells} == {("a", 1), ("b", 1)}
        assert first.predicted_rows_per_s > 0
        pid = planner.pid
        again = await planner.plan(msgspec.structs.replace(asked, running=first.cells))
        assert planner.pid == pid
        assert again.running_rows_per_s == pytest.approx(first.predicted_rows_per_s)
        gone = await planner.plan(msgspec.structs.replace(asked, running=(("elsewhere", "a", 1),)))
        assert gone.running_rows_per_s == 0
        async with asyncio.timeout(60):
            while planner.pid is not None:
                await asyncio.sleep(0.05)
    finally:
        await planner.close()


async def test_the_planning_process_says_what_does_not_fit_and_may_be_killed() -> None:
    big = ensemble(members=[profiled("a", memory="3Gi")])
    members = members_to_serve(big, {}, None)
    asked = question(big, members, DEVICES, measured(big, members.sources, [CLASS], Book(), 0.0), ())
    planner = Planner()
    try:
        found = await planner.plan(asked)
        assert found.kind == DOES_NOT_FIT
        assert "needs 3072 MiB" in found.error
        slow = Planner(deadline_s=0.0)
        with pytest.raises(PlannerFailed, match="no plan was found"):
            await slow.plan(asked)
        assert slow.pid is None
        await slow.close()
    finally:
        await planner.close()
    assert planner.pid is None
