"""Plans replace one another under load: no request fails, no answer mixes versions, and nothing is built twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from ensemble_contract.plan import GatewayPlan, Instance, ModelSource, ServedMember, WorkerAddress, WorkerPlan
from ensemble_contract.plan import encode_plan as encoded
from ensemble_gateway.gateway import Gateway, StalePlan
from tests.support.data_plane import LocalGateway, Worker, ask_unix, serving
from tests.support.http_client import infer
from tests.support.plane_members import X, Y, write_models

SWITCH_S = 20.0
ONES = np.ones((3, 8), np.float32)


@dataclass(frozen=True)
class Fleet:
    """Two workers. `a` is times 1 as version v1 on `left`, times 3 as v2 on `right`; `b` is times 2 on both."""

    left: Worker
    right: Worker
    sources: dict[tuple[str, str], ModelSource]

    def plan(
        self, generation: int, *members: tuple[str, str, float], workers: str = "both", **more: object
    ) -> GatewayPlan:
        """A plan of members as (name, digest, weight)."""
        served = tuple(ServedMember(name, digest, weight=weight) for name, digest, weight in members)
        chosen = {"both": (self.left, self.right), "left": (self.left,), "right": (self.right,)}[workers]
        plan = GatewayPlan(
            generation, "echo", X, Y, served, tuple(worker.address for worker in chosen),
            rule="weightedMean", max_queue_bytes=4 << 20, timeout_s=10.0,
        )  # fmt: skip
        return msgspec.structs.replace(plan, **more)

    def host(self, worker: Worker, generation: int, *versions: tuple[str, str]) -> None:
        """Have a worker run these versions."""
        sources = tuple(self.sources[version] for version in versions)
        instances = tuple(Instance(name, 32, digest) for name, digest in versions)
        plan = WorkerPlan(generation, "any", worker.plan.worker, X, Y, sources, instances)
        status, body = ask_unix(worker.admin, "PUT", "/v1/plan", encoded(plan))
        assert status == 202, body


FACTORS = {("a", "v1"): 1.0, ("a", "v2"): 3.0, ("b", "v1"): 2.0}


def factor(plan: GatewayPlan) -> float:
    """What the plan's answer is of a row of ones."""
    weights = [member.weight for member in plan.members]
    values = [FACTORS[member.name, member.digest] for member in plan.members]
    return float(np.dot(weights, values) / sum(weights))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    files = write_models(folder)
    models = {("a", "v1"): "times1", ("a", "v2"): "times3", ("b", "v1"): "times2"}
    sources = {
        version: msgspec.structs.replace(files[file], name=version[0], digest=version[1])
        for version, file in models.items()
    }
    placed = {"left": (("a", "v1"), ("b", "v1")), "right": (("a", "v2"), ("b", "v1"))}
    workers: dict[str, Worker] = {}
    try:
        for name, versions in placed.items():
            chosen = tuple(sources[version] for version in versions)
            instances = tuple(Instance(source.name, 32, source.digest) for source in chosen)
            workers[name] = Worker(folder, WorkerPlan(1, "any", name, X, Y, chosen, instances))
        for worker in workers.values():
            worker.wait_ready()
        yield Fleet(workers["left"], workers["right"], sources)
    finally:
        for worker in workers.values():
            worker.end()


@dataclass
class Load:
    """Clients that ask on; `newest` is what requests sent from now on may be answered by at the least."""

    plans: list[GatewayPlan]
    newest: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    stopped: bool = False

    async def ask_on(self, local: LocalGateway) -> None:
        async with await local.connect() as client:
            while not self.stopped:
                at_least = self.newest
                reply = await client.ask(infer(ONES))
                if reply.status != 200:
                    self.wrong.append(reply.error)
                    continue
                values = np.unique(reply.y())
                # Of a plan adopted meanwhile too; all rows and values by the same one.
                allowed = [factor(plan) for plan in self.plans[at_least:]]
                if len(values) != 1 or not np.isclose(values[0], allowed, rtol=1e-5).any():
                    self.wrong.append(f"{values} is of none of {allowed}")
                self.answered += 1


@contextlib.asynccontextmanager
async def loaded(local: LocalGateway, load: Load, clients: int = 8) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(load.ask_on(local)) for _ in range(clients)]
    try:
        yield
        load.stopped = True
        async with asyncio.timeout(SWITCH_S):
            await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def until_served(gateway: Gateway, plan: GatewayPlan) -> None:
    async with asyncio.timeout(SWITCH_S):
        while gateway.pipeline.plan != plan:
            await asyncio.sleep(0.005)


async def until_settled(gateway: Gateway) -> None:
    async with asyncio.timeout(SWITCH_S):
        while gateway.retiring:
            await asyncio.sleep(0.005)


V1, V2 = ("a", "v1", 1.0), ("a", "v2", 1.0)
B, HEAVY_B = ("b", "v1", 1.0), ("b", "v1", 3.0)


def changes(fleet: Fleet, rounds: int) -> list[GatewayPlan]:
    """A version, a weight, a member and the set of workers change, again and again."""
    steps: Sequence[tuple[tuple[tuple[str, str, float], ...], str]] = (
        ((V1, B), "both"),
        ((V1, B), "left"),
        ((V1, B), "both"),
        ((V2, B), "both"),
        ((V2, HEAVY_B), "both"),
        ((V2, HEAVY_B), "right"),
        ((B,), "right"),
        ((B, V1), "both"),
    )
    chosen = itertools.islice(itertools.cycle(steps), rounds)
    return [fleet.plan(at + 1, *members, workers=workers) for at, (members, workers) in enumerate(chosen)]


async def test_no_request_fails_or_is_wrong_while_plans_change(fleet: Fleet) -> None:
    plans = changes(fleet, 25)
    load = Load(plans)
    async with serving(plans[0]) as local:
        gateway = local.gateway
        engine = gateway.pipeline.engine
        left = engine.links["left"]
        async with loaded(local, load):
            for index, plan in enumerate(plans[1:], start=1):
                gateway.adopt(plan)
                await until_served(gateway, plan)
                load.newest = index
                goal = load.answered + 100
                async with asyncio.timeout(SWITCH_S):
                    while load.answered < goal:
                        await asyncio.sleep(0.005)
                if "left" in {worker.name for worker in plan.workers} and index < 5:
                    assert engine.links["left"] is left, "an unchanged worker keeps its link"
        await until_settled(gateway)
        assert gateway.pipeline.engine is engine, "rows lie in one store all the time"
        assert engine.store.used_rows == 0
        assert engine.pipelines == [gateway.pipeline]
    assert load.wrong == []
    assert load.answered >= 2400


async def test_plans_that_come_faster_than_they_can_be_served_are_skipped(fleet: Fleet) -> None:
    plans = changes(fleet, 40)
    load = Load(plans)
    async with serving(plans[0]) as local:
        async with loaded(local, load):
            for plan in plans[1:]:
                local.gateway.adopt(plan)
                await asyncio.sleep(0)
            await until_served(local.gateway, plans[-1])
            await until_settled(local.gateway)
        async with asyncio.timeout(SWITCH_S):
            while len(local.gateway.pipeline.engine.dispatcher.states()) != len(plans[-1].workers):
                await asyncio.sleep(0.01)
    assert load.wrong == []


async def test_a_former_plan_serves_until_every_member_of_the_next_is_live(fleet: Fleet) -> None:
    first = fleet.plan(1, V1, B)
    missing = fleet.plan(2, ("a", "nowhere", 1.0), B)
    async with serving(first) as local, await local.connect() as client:
        local.gateway.adopt(missing)
        for _ in range(5):
            np.testing.assert_allclose((await client.ask(infer(ONES))).y(), factor(first) * ONES)
        assert local.gateway.pipeline.plan == first
        assert local.gateway.retiring == 1
        # Only on a worker that the plan does not name: that is about to go.
        local.gateway.adopt(fleet.plan(3, V2, B, workers="left"))
        np.testing.assert_allclose((await client.ask(infer(ONES))).y(), factor(first) * ONES)
        assert local.gateway.pipeline.plan == first
        last = fleet.plan(4, V2, B)
        local.gateway.adopt(last)
        await until_served(local.gateway, last)
        np.testing.assert_allclose((await client.ask(infer(ONES))).y(), factor(last) * ONES)


async def test_the_highest_generation_wins_and_an_equal_one_must_be_equal(fleet: Fleet) -> None:
    async with serving(fleet.plan(5, V1, B)) as local:
        local.gateway.adopt(fleet.plan(5, V1, B))
        with pytest.raises(StalePlan, match="generation 5 is another plan here"):
            local.gateway.adopt(fleet.plan(5, V1, HEAVY_B))
        with pytest.raises(StalePlan, match="generation 4 is older than 5"):
            local.gateway.adopt(fleet.plan(4, V1, B))
        local.gateway.adopt(fleet.plan(7, ("a", "nowhere", 1.0), B))
        with pytest.raises(StalePlan, match="generation 6 is older than 7"):
            local.gateway.adopt(fleet.plan(6, V1, B))


async def test_with_hold_requests_wait_for_the_members_to_come(fleet: Fleet) -> None:
    """Even where a quorum could answer without them; the deadline is kept."""
    held = fleet.plan(2, ("a", "v3", 1.0), B, hold=True, quorum=1)
    fleet.sources["a", "v3"] = msgspec.structs.replace(fleet.sources["a", "v2"], digest="v3")
    async with serving(fleet.plan(1, V1, B)) as local:
        gateway = local.gateway
        waiting, hurried = await local.connect(), await local.connect()
        gateway.adopt(held)
        assert gateway.pipeline.plan == held
        assert gateway.ready
        waiting.send(infer(ONES))
        reply = await hurried.ask(infer(ONES, parameters={"timeout": 1_000_000}))
        np.testing.assert_allclose(reply.y(), 2 * ONES)
        assert b'"members_missing":"a"' in reply.body
        assert gateway.pipeline.in_flight == 1, "the other waits on"
        await asyncio.to_thread(fleet.host, fleet.right, 10, ("a", "v3"), ("b", "v1"))
        try:
            np.testing.assert_allclose((await waiting.reply()).y(), 2.5 * ONES)
        finally:
            await asyncio.to_thread(fleet.host, fleet.right, 11, ("a", "v2"), ("b", "v1"))
            await asyncio.to_thread(fleet.right.wait_ready)


async def test_another_store_counts_the_rows_of_the_former_within_its_limit(fleet: Fleet) -> None:
    first = fleet.plan(1, V1, B)
    smaller = fleet.plan(2, V1, B, max_queue_bytes=2 << 20)
    load = Load([first, smaller])
    async with serving(first) as local:
        async with loaded(local, load):
            former = local.gateway.pipeline.engine
            local.gateway.adopt(smaller)
            await until_served(local.gateway, smaller)
            await until_settled(local.gateway)
        assert load.wrong == []
        store = local.gateway.pipeline.engine.store
        assert local.gateway.pipeline.engine is not former
        row = store.bytes_per_row(2)
        assert store.allocator.capacity == (2 << 20) // row
        ranges = store.allocator.take(10)
        assert ranges is not None
        local.gateway.pipeline.engine.share_store(others_bytes=1 << 20)
        assert store.allocator.capacity == (1 << 20) // row
        assert store.used_rows == 10
        store.allocator.give(ranges)


async def test_a_worker_at_another_address_gets_another_link(fleet: Fleet) -> None:
    first = fleet.plan(1, V1, B)
    async with serving(first) as local, await local.connect() as client:
        engine = local.gateway.pipeline.engine
        left, right = engine.links["left"], engine.links["right"]
        gone = WorkerAddress("right", "unix:/nowhere/at/all")
        moved = msgspec.structs.replace(first, generation=2, workers=(first.workers[0], gone))
        local.gateway.adopt(moved)
        await until_served(local.gateway, moved)
        assert engine.links["left"] is left
        assert engine.links["right"] is not right
        np.testing.assert_allclose((await client.ask(infer(ONES))).y(), factor(first) * ONES)
