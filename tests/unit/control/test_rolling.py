"""The plan in the ConfigMap: written anew where nobody takes it or requests wait in vain, and told of then."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from ensemble_contract.plan import EnsemblePlan, GatewayPlan, WorkerPlan
from ensemble_operator.control.book import Book
from ensemble_operator.control.errors import Unavailable
from ensemble_operator.control.kinds import CONFIG_MAP, Key
from ensemble_operator.control.observe import Observed, Observer
from ensemble_operator.control.onepass import Memory, Pass
from ensemble_operator.control.planning import members_to_serve, question, target_of, tensors_of, wanted_sources
from ensemble_operator.control.planstage import tell_change
from ensemble_operator.control.profiling import measured
from ensemble_operator.control.questions import PlanAnswer
from ensemble_operator.control.rolling import Rolling
from ensemble_operator.control.stepping import goal_of
from ensemble_operator.control.target import Mirror, Target, TargetDevice, read_mirror
from ensemble_operator.control.upkeep import Upkeep
from ensemble_operator.fleet import Fleet
from tests.unit.control.ensembles import CLASS, MIB, ensemble, gateway, observed, pod, profiled, worker
from tests.unit.control.fake_cluster import FakeCluster, world_of

KEY = Key("default", "tiny")
TINY = ensemble(members=[profiled("a")])
SOURCES = wanted_sources(TINY)
NAME = "tiny-worker-0"
DEVICES = {NAME: TargetDevice(CLASS, "cpu", 1024 * MIB, 700 * MIB)}
FAILING = {("b", "digest"): "no model"}


class Pods:
    """Workers and gateways that take every plan."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    async def put_plan(self, address: str, plan: WorkerPlan | GatewayPlan, token: str) -> None:
        self.taken.append(plan.generation)


def mirror(generation: int, *, hold: bool = False) -> Mirror:
    """A plan of one instance, and the target that it reaches."""
    members = members_to_serve(TINY, {}, None)
    asked = question(TINY, members, DEVICES, measured(TINY, members.sources, [CLASS], Book(), 0.0), ())
    target = target_of(asked, PlanAnswer(((NAME, "a", 1),), 100.0, 100.0, "why"), DEVICES, None)
    goal = goal_of(TINY, members, tensors_of(TINY, members.sources, Book()), target, {NAME: "tcp://h:1"}, 0)
    told = msgspec.structs.replace(goal.gateway, generation=generation, hold=hold)
    return Mirror(msgspec.structs.replace(goal, gateway=told), target)


def rolling() -> tuple[Rolling, FakeCluster, Pods]:
    world, cluster = world_of()
    pods = Pods()
    observer = Observer(world.store, cast("Fleet", pods), world.settings)
    return Rolling(world, cast("Fleet", pods), observer, Upkeep(world)), cluster, pods


def a_pass(seen: Observed, memory: Memory | None = None) -> Pass:
    document: dict[str, Any] = {"metadata": {"name": "tiny", "namespace": "default", "uid": "u"}}
    return Pass(KEY, document, 0.0, memory or Memory(), ensemble=TINY, seen=seen)


def written(cluster: FakeCluster) -> EnsemblePlan:
    plan = read_mirror(cluster.objects[CONFIG_MAP, "tiny-plan"]).plan
    assert plan is not None
    return plan


async def test_everybody_is_given_the_plan_that_is_there() -> None:
    roll, cluster, pods = rolling()
    before = mirror(3)
    await roll.keep(a_pass(observed([worker(NAME)], [gateway(2)], before)))
    assert written(cluster) == before.plan
    assert pods.taken == [3, 3]


async def test_a_plan_older_than_what_pods_have_becomes_the_newest() -> None:
    roll, cluster, pods = rolling()
    before = mirror(3)
    assert before.plan is not None
    one = a_pass(observed([worker(NAME)], [gateway(7)], before))
    await roll.keep(one)
    assert written(cluster).generation == 8
    assert written(cluster).sources == before.plan.sources
    assert pods.taken == [8, 8]
    assert one.retry_s is not None


@pytest.mark.parametrize(("trouble", "hold"), [("ImagePullBackOff: no such image", False), ("", True)])
async def test_requests_are_held_for_a_pod_only_while_it_can_come(trouble: str, hold: bool) -> None:
    roll, cluster, _ = rolling()
    coming = worker(NAME, pod=pod(NAME, ready=False, trouble=trouble), device=None, report=None)
    await roll.keep(a_pass(observed([coming], [gateway(3)], mirror(3, hold=True))))
    assert written(cluster).gateway.hold is hold
    assert written(cluster).generation == (3 if hold else 4)


async def test_another_matrix_is_told_when_it_is_written() -> None:
    roll, cluster, _ = rolling()
    one = a_pass(observed([worker(NAME)], [gateway(3)], mirror(3)))
    assert one.look.mirror.target is not None
    tell_change(one, None, one.look.mirror.target)
    cluster.failing = {CONFIG_MAP: Unavailable("away")}
    with pytest.raises(Unavailable):
        await roll.keep(one)
    assert one.events == []
    cluster.failing = {}
    await roll.keep(one)
    await roll.keep(one)
    assert [event.reason for event in one.events] == ["PlanChanged"]


def test_matrices_between_which_retries_go_are_told_once() -> None:
    memory = Memory()
    target = mirror(1).target
    assert target is not None
    other = msgspec.structs.replace(target, rows={NAME: ((0, 8),)})

    def is_told(now: Target) -> bool:
        one = a_pass(observed(), memory)
        tell_change(one, target, now)
        return one.change is not None

    assert is_told(target)
    memory.failing = FAILING
    assert [is_told(now) for now in (other, target, other, target)] == [True, False, False, False]
    memory.failing = {}
    assert is_told(other)
    assert is_told(target)
