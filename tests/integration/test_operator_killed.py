"""An operator that is killed at every stage of a deployment and of a rollout ends where one that is not would."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.control_plane import ControlPlane
from tests.support.mlp_answers import ROW, check_answer
from tests.support.models import export_mlp
from tests.support.operating import OWNED, Operating, member, operating, resource
from tests.support.operator_process import OperatorProcess, operator_process
from tests.support.steady_asking import asking

CHILDREN = {
    ("Secret", "tiny-worker"),
    ("Secret", "tiny-gateway"),
    ("ConfigMap", "tiny-plan"),
    ("ConfigMap", "tiny-profiles"),
    ("Service", "tiny"),
    ("Service", "tiny-worker"),
    ("ServiceAccount", "tiny-worker"),
    ("ServiceAccount", "tiny-gateway"),
    ("NetworkPolicy", "tiny-worker"),
    ("NetworkPolicy", "tiny-gateway"),
    ("PodDisruptionBudget", "tiny-worker"),
    ("StatefulSet", "tiny-worker"),
    ("Deployment", "tiny-gateway"),
}
STAGE_S = 90.0

pytestmark = pytest.mark.timeout(500)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("abc")}


class Stages:
    """Kills the operator when a stage is reached, starts it again, and notes which children there were."""

    def __init__(self, world: Operating, operator: OperatorProcess) -> None:
        self._world, self._operator = world, operator
        self.uids: dict[tuple[str, str], set[str]] = {}

    async def kill_when(self, reached: Callable[[], Awaitable[object]], what: str) -> None:
        """Wait for the stage, then kill."""
        try:
            async with asyncio.timeout(STAGE_S):
                while not await reached():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {STAGE_S:g} s: {what}\n{self._operator.text()[-4000:]}") from None
        self._operator.kill()
        await self.note()
        self._operator.start()

    async def note(self) -> None:
        """Remember the uids of all children."""
        for kind in OWNED:
            for child in await self._world.children(kind, "tiny"):
                key = kind, child["metadata"]["name"]
                self.uids.setdefault(key, set()).add(child["metadata"]["uid"])


async def generation_of(world: Operating) -> int:
    plan = await world.plan("tiny")
    return int(plan["gateway"]["generation"]) if plan else 0


def measurings(world: Operating) -> Counter[str]:
    """How often workers began to measure a member at some sizes."""
    logs = [pod.log.read_text() for name, pod in world.kubelet.pods.items() if "-worker-" in name and pod.log.exists()]
    return Counter(found for log in logs for found in re.findall(r"measuring (\w+ at [\d, ]+ rows)", log))


async def test_killed_at_every_stage(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path], tmp_path: Path
) -> None:
    first = resource("tiny", [member("a", files["a"], profiled=False), member("b", files["b"], profiled=False)])
    second = resource("tiny", [member("a", files["a"], profiled=False), member("c", files["c"])])
    async with operating(control_plane, namespace, start=False) as world:
        with operator_process(control_plane.kubeconfig, namespace, tmp_path) as operator:
            stages = Stages(world, operator)
            await world.apply(first)
            await deploy(world, stages)
            await world.until_ready("tiny")
            await check_answer(world, "tiny", 0, 1)
            before = await generation_of(world)
            async with asking(world, "tiny", ROW) as answers:
                await world.apply(second)
                for step in range(3):
                    await stages.kill_when(partial(past, world, before + step), f"step {step} of the rollout")
                await world.until_ready("tiny")
            assert answers.failed == []
            assert answers.count > 10
            await check_answer(world, "tiny", 0, 2)
            await stages.note()
            check_children(stages)
            await check_end(world)
            counts = measurings(world)
            assert max(counts.values()) == 1, f"measured twice: {counts}"
            assert operator.end() == 0
            assert operator.defects() == []


async def deploy(world: Operating, stages: Stages) -> None:
    """Kill the operator at each stage of the first deployment."""
    kube, namespace = world.kube, world.namespace

    async def has_measured() -> bool:
        found = await kube.get("ConfigMap", namespace, "tiny-profiles")
        return found is not None and any(len(name) == 16 for name in found["data"])

    async def is_started() -> bool:
        return any("-worker-" in name and pod.process is not None for name, pod in world.kubelet.pods.items())

    async def measures() -> bool:
        return bool(measurings(world))

    await stages.kill_when(lambda: world.children("Secret", "tiny"), "Secrets")
    if len(stages.uids) == 1:
        # Killed between the two: what the first expects of the other is lost, so it is made anew, before any pod.
        stages.uids.clear()
    await stages.kill_when(lambda: world.children("StatefulSet", "tiny"), "the StatefulSet")
    await stages.kill_when(is_started, "workers that start")
    await stages.kill_when(measures, "a worker that measures")
    await stages.kill_when(has_measured, "measurements in the ConfigMap")
    await stages.kill_when(lambda: world.plan("tiny"), "the first plan")


async def past(world: Operating, generation: int) -> bool:
    """Whether a plan after this generation is written, or the rollout took fewer steps."""
    status = await world.status("tiny")
    rolled = {c["type"]: c for c in status["conditions"]}["RolloutBlocked"]["reason"] == "Done"
    is_over = rolled and status["observedGeneration"] == 2
    return is_over or await generation_of(world) > generation


def check_children(stages: Stages) -> None:
    """Each was made once; of the pods, too, no more than the two workers and the gateway were ever there."""
    assert {key: uids for key, uids in stages.uids.items() if len(uids) != 1} == {}
    pods = [name for kind, name in stages.uids if kind == "Pod"]
    assert sorted(name.startswith("tiny-worker-") for name in pods) == [False, True, True]
    assert {key for key in stages.uids if key[0] != "Pod"} == CHILDREN


async def check_end(world: Operating) -> None:
    plan = await world.plan("tiny")
    assert {source["name"] for source in plan["sources"]} == {"a", "c"}
    assert not plan["gateway"].get("hold", False)
    assert sorted(plan["rows"]) == ["tiny-worker-0", "tiny-worker-1"]
    status = await world.status("tiny")
    assert (status["phase"], status["replicas"]) == ("Ready", 2)
    assert (status["devices"]["summary"], status["members"]["summary"]) == ("2/2", "2/2")
    reasons = [reason for reason, _ in await world.events("tiny")]
    assert reasons.count("Ready") == 1, reasons
