"""From plans to the words of a rollout and back: what is placed, what is served, and the plan of each step."""

from __future__ import annotations

import msgspec
import pytest

from ensemble_contract.plan import (
    EnsemblePlan,
    GatewayPlan,
    ModelSource,
    ServedMember,
    WorkerAddress,
    decode_plan,
    encode_plan,
)
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.rollout import plans
from ensemble_operator.rollout.placement import Cell, Placement, Step, Version
from ensemble_operator.rollout.steps import steps
from tests.unit.rollout.worlds import memory, placement

X, Y = (TensorSpec("x", "FP32", (4,)),), (TensorSpec("y", "FP32", (3,)),)
WORKERS = (WorkerAddress("w0", "tcp://10.0.0.1:5555"), WorkerAddress("w1", "tcp://10.0.0.2:5555"))


def source(text: str) -> ModelSource:
    """`a2` is file and digest 2 of member a."""
    return ModelSource(text[0], text[1:], f"file:///m/{text}.pt2", "torch-export", version=text[1:])


def plan(served: str, rows: dict[str, str], *, generation: int = 1, quorum: int = 0, **more: object) -> EnsemblePlan:
    """`a1*2 b1` served, `{"w0": "a1x8"}` placed."""
    members = []
    for word in served.split():
        name, _, weight = word.partition("*")
        one = source(name)
        members.append(ServedMember(one.name, one.digest, one.version, float(weight or 1)))
    cells = placement(rows)
    versions = dict.fromkeys([(m.name, m.digest) for m in members] + sorted((c.member, c.digest) for c in cells))
    indices = {version: at for at, version in enumerate(versions)}
    gateway = GatewayPlan(generation, "e", X, Y, tuple(members), WORKERS, rule="weightedMean", quorum=quorum)
    return EnsemblePlan(
        msgspec.structs.replace(gateway, **more),
        tuple(source(name + digest) for name, digest in versions),
        {
            w.name: tuple((indices[c.member, c.digest], c.batch_size) for c in sorted(cells) if c.worker == w.name)
            for w in WORKERS
        },
    )


def test_what_a_plan_places_and_serves() -> None:
    found = plan("a1 b1*2", {"w0": "a1x8 a1x1", "w1": "b1x8 b2x8"})
    assert plans.placement_of(found) == placement({"w0": "a1x8 a1x1", "w1": "b1x8 b2x8"})
    assert plans.service_of(found.gateway).versions == (Version("a", "1"), Version("b", "1"))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (plan("a1 b1", {}, generation=9), True),
        (plan("a1 b1", {"w0": "a1x8"}, workers=WORKERS[:1]), True),
        (plan("a1 b1*2", {}), False),
        (plan("b1 a1", {}), False),
        (plan("a1 b2", {}), False),
        (plan("a1 b1", {}, timeout_s=3.0), False),
        (plan("a1 b1", {}, rule="mean"), False),
        (plan("a1 b1", {}, quorum=1), False),
        (plan("a1 b1", {}, hold=True), False),
    ],
    ids=["generation", "workers", "weight", "order", "version", "timeout", "rule", "quorum", "hold"],
)
def test_what_clients_notice_is_another_service(other: EnsemblePlan, same: bool) -> None:
    assert (plans.service_of(other.gateway) == plans.service_of(plan("a1 b1", {}).gateway)) == same


def test_what_is_observed() -> None:
    newest = plan("a1 b1", {"w0": "a1x8 b1x8", "w1": "a1x8"})
    a0, b0, a1 = Cell("w0", "a", "1", 8), Cell("w0", "b", "1", 8), Cell("w1", "a", "1", 8)
    leaving, broken = Cell("w1", "b", "1", 8), Cell("w1", "c", "1", 8)
    states = {a0: "ready", b0: "failed", leaving: "draining", broken: "failed"}
    found = plans.running(newest, states, settled=False)
    assert found.planned == {a0, b0, a1}
    assert (found.live, found.failed) == (frozenset({a0}), frozenset({b0}))
    assert found.lingering == {leaving}, "what has failed holds no memory"
    assert found.service == plans.service_of(newest.gateway)
    assert plans.running(None, {}, settled=True).service is None


def walked(former: EnsemblePlan, goal: EnsemblePlan, room: float, *, pause: bool = False) -> list[EnsemblePlan]:
    """Every plan on the way, each as the next one's former."""
    cells: Placement = plans.placement_of(former)
    running = plans.running(former, dict.fromkeys(cells, "ready"), settled=True)
    found, blocked = steps(
        running, plans.wanted(goal, pause=pause), memory({"w0": room, "w1": room}, {"a1": 2, "a2": 2, "b1": 2, "b2": 2})
    )
    assert blocked is None
    taken = []
    for step in found:
        former = plans.plan_of(step, former.generation + 1, goal, former)
        assert decode_plan(encode_plan(former), EnsemblePlan) == former
        assert plans.placement_of(former) == step.placement
        taken.append(former)
    return taken


def served(found: EnsemblePlan) -> str:
    return " ".join(f"{m.name}{m.digest}*{m.weight:g}" for m in found.gateway.members)


def test_the_last_plan_is_the_goal_and_generations_rise() -> None:
    former, goal = plan("a1 b1", {"w0": "a1x8 b1x8"}, generation=4), plan("a2*3 b1", {"w0": "a2x8 b1x8"})
    taken = walked(former, goal, 6)
    assert [p.generation for p in taken] == [5, 6, 7]
    assert [served(p) for p in taken] == ["a1*1 b1*1", "a2*3 b1*1", "a2*3 b1*1"]
    assert taken[-1].gateway == msgspec.structs.replace(goal.gateway, generation=7)
    assert {s.digest for s in taken[0].sources if s.name == "a"} == {"1", "2"}
    row = taken[0].worker("w0")
    assert row is not None
    assert {(i.member, i.digest) for i in row.instances} == {("a", "1"), ("a", "2"), ("b", "1")}


def test_members_switched_one_by_one_keep_the_former_terms_until_the_last() -> None:
    former, goal = plan("a1*2 b1*5", {"w0": "a1x8 b1x8"}, quorum=2), plan("a2*3 b2*4", {"w0": "a2x8 b2x8"}, quorum=1)
    taken = walked(former, goal, 6)
    assert [served(p) for p in taken[1:3]] == ["a2*2 b1*5", "a2*2 b1*5"]
    assert [p.gateway.quorum for p in taken[1:3]] == [2, 2]
    new = next(m for m in taken[1].gateway.members if m.name == "a")
    assert new.version == "2"
    assert served(taken[-1]) == "a2*3 b2*4"


def test_a_member_that_goes_early_leaves_a_quorum_that_can_be_met() -> None:
    former, goal = plan("a1 b1", {"w0": "a1x8 b1x8"}, quorum=2), plan("a2", {"w0": "a2x8"}, quorum=1)
    taken = walked(former, goal, 4)
    assert [served(p) for p in taken][:2] == ["a1*1", "a1*1"]
    assert taken[0].gateway.quorum == 1


def test_requests_are_held_and_let_go() -> None:
    former = plan("a1 b1", {"w0": "a1x8", "w1": "b1x8"})
    goal = plan("a2 b1", {"w0": "a2x8", "w1": "b1x8"})
    taken = walked(former, goal, 3, pause=True)
    assert [p.gateway.hold for p in taken] == [True, True, True, False]
    assert {served(p) for p in taken} == {"a2*1 b1*1"}


def test_a_first_plan_has_no_former() -> None:
    goal = plan("a1", {"w0": "a1x8"})
    step = Step(plans.placement_of(goal), plans.service_of(goal.gateway))
    found = plans.plan_of(step, 3, goal, None)
    assert (found.generation, found.rows) == (3, goal.rows)


def test_memory_comes_from_profiles_and_what_is_unknown_cannot_be_placed() -> None:
    problem = Problem(
        (Member("a"),),
        (DeviceSpec("w0", "K", "cuda", 1000, 100), DeviceSpec("w1", "L", "cuda", 50, 100)),
        (Profile("a", "K", 8, 10.0, 0.1, 300), Profile("a", "L", 8, 10.0, 0.1, 400)),
        (8,),
        headroom=0.1,
    )
    room = plans.memory_of(problem, plans.needs_of(problem, [source("a1")]))
    assert room.usable_bytes == {"w0": 800.0, "w1": 0.0}
    assert room.need_bytes(Cell("w0", "a", "1", 8)) == 300
    assert room.need_bytes(Cell("w1", "a", "1", 8)) == 400
    assert room.need_bytes(Cell("w0", "a", "2", 8)) == float("inf")
    assert room.batch_sizes == (8,)
