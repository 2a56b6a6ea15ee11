"""What cannot work becomes a condition that says what to do, and the rest goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.support.control_plane import ControlPlane
from tests.support.kube_client import path_of
from tests.support.models import export_mlp
from tests.support.operating import Operating, member, operating, resource

pytestmark = pytest.mark.timeout(300)

ONE = {"count": 1, "resource": "cpu", "cores": "500m", "memory": "1Gi"}


def said(status: dict[str, Any], type_: str) -> dict[str, Any]:
    found: dict[str, Any] = next((c for c in status.get("conditions", ()) if c["type"] == type_), {})
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: export_mlp(tmp_path / f"{name}.pt2", seed=seed) for seed, name in enumerate("ab")}


async def test_members_that_cannot_be_loaded_are_named_and_the_quorum_answers(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path], tmp_path: Path
) -> None:
    async with operating(control_plane, namespace) as world:
        broken = tmp_path / "broken.pt2"
        broken.write_bytes(b"this is no model")
        members = [
            member("good", files["a"]),
            member("missing", tmp_path / "missing.pt2", profiled=False),
            member("broken", broken),
            {**member("other", files["b"]), "model": {"uri": files["b"].as_uri(), "sha256": "0" * 64}},
        ]
        await world.apply(resource("tiny", members, combine={"rule": "mean", "quorum": 1}))
        status = await world.until(
            "tiny",
            lambda s: all(
                f"member {name}: " in said(s, "Degraded").get("message", "") for name in ("missing", "broken", "other")
            ),
        )
        text = said(status, "Degraded")["message"]
        assert "missing.pt2" in text
        assert "sha256" in text.lower() or "digest" in text.lower() or "hash" in text.lower()
        assert said(status, "Ready")["status"] == "False"
        await world.until_answered("tiny", [[0.5] * 64])
        async with asyncio.timeout(60):
            while await failed_members(world) != {"member missing", "member broken", "member other"}:
                await asyncio.sleep(0.1)
        events, before = await world.events("tiny"), -1
        async with asyncio.timeout(90):
            while len(events) != before:
                before = len(events)
                await asyncio.sleep(2)
                events = await world.events("tiny")
        assert len(set(events)) == len(events), "no event is repeated"


async def failed_members(world: Operating) -> set[str]:
    """Whose failure an event tells of."""
    return {note.split(":")[0] for reason, note in await world.events("tiny") if reason == "MemberFailed"}


async def test_a_member_added_that_cannot_be_loaded_leaves_the_others_as_they_are(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path], tmp_path: Path
) -> None:
    async with operating(control_plane, namespace) as world:
        await world.apply(resource("tiny", [member("a", files["a"]), member("b", files["b"])]))
        await world.until_ready("tiny")
        broken = tmp_path / "broken.pt2"
        broken.write_bytes(b"this is no model")
        replaced = {**member("b", broken), "model": {"uri": broken.as_uri(), "version": "2"}}
        await world.apply(resource("tiny", [member("a", files["a"]), replaced, member("c", broken)]))
        status = await world.until(
            "tiny",
            lambda s: {"member b", "member c"} <= {p.split(":")[0] for p in said(s, "Degraded")["message"].split("; ")},
        )
        assert said(status, "Ready")["status"] == "True"
        answer = await world.ask("tiny", [[0.5] * 64])
        assert "outputs" in answer, answer


async def test_too_few_gpus_says_held_free_and_what_is_needed(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    gpus = {"count": 3, "resource": "nvidia.com/gpu", "acquireTimeout": "4s"}
    async with operating(control_plane, namespace, node={"gpus": 1}, start=False) as world:
        await world.apply(resource("tiny", [member("a", files["a"])], devices=gpus))
        await world.start_operator()
        status = await world.until(
            "tiny", lambda s: said(s, "DevicesAcquired").get("reason") in ("TooFewDevices", "NoDeviceVisible")
        )
        message = said(status, "DevicesAcquired")["message"]
        assert "of 3 devices held" in message
        # It cannot run so: the devices are given back for others, and tried for again later.
        status = await world.until("tiny", lambda s: said(s, "DevicesAcquired").get("reason") == "AcquireTimeout")
        assert status["phase"] == "Released"
        workers = await world.kube.get("StatefulSet", namespace, "tiny-worker")
        assert workers is not None
        assert workers["spec"]["replicas"] == 0


async def test_what_does_not_fit_is_named_with_its_need(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        big = member("a", files["a"])
        big["profile"] = {"measurements": [{"batchSize": 1, "memory": "3Gi", "latency": "1ms"}]}
        await world.apply(resource("tiny", [big], batching={"sizes": [1], "maxQueueBytes": "16Mi"}))
        status = await world.until("tiny", lambda s: said(s, "Planned").get("reason") == "DoesNotFit")
        assert "it needs 3072 MiB at batch size 1" in said(status, "Planned")["message"]


async def test_specs_that_cannot_be_accepted(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        reaching = resource("reaching", [member("a", files["a"])])
        reaching["spec"]["podTemplate"] = {"worker": {"image": "mine:1", "env": [{"name": "X", "value": "1"}]}}
        reaching["spec"]["members"].append({"name": "p", "model": {"uri": "pvc://claim/model.pt2"}})
        scaled = resource("scaled", [member("a", files["a"])])
        del scaled["spec"]["devices"]["count"]
        scaled["spec"]["autoscaling"] = {"min": 1, "max": 3}
        for one in (reaching, scaled):
            await world.apply(one)
        status = await world.until("reaching", lambda s: said(s, "Accepted").get("status") == "False")
        message = said(status, "Accepted")["message"]
        assert status["phase"] == "Rejected"
        for path in ("podTemplate.worker.image", "podTemplate.worker.env", "members[1].model.uri"):
            assert path in message
        assert "allowOverrides" in message
        assert await world.children("StatefulSet", "reaching") == []
        status = await world.until("scaled", lambda s: said(s, "Accepted").get("status") == "True")
        assert "autoscaling is not acted upon yet: 1 devices are held" in said(status, "Accepted")["message"]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("Service", "tiny", {"spec": {"ports": [{"name": "http", "port": 80}], "selector": {"app": "theirs"}}}),
        ("ServiceAccount", "tiny-worker", {"automountServiceAccountToken": True}),
        ("ConfigMap", "tiny-plan", {"data": {"theirs": "precious"}}),
    ],
)
async def test_an_object_of_somebody_else_is_left_alone(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path], kind: str, name: str, content: dict[str, Any]
) -> None:
    async with operating(control_plane, namespace) as world:
        theirs = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}, **content}
        before = await world.kube.create(theirs)
        await world.apply(resource("tiny", [member("a", files["a"])], devices=ONE))
        status = await world.until("tiny", lambda s: said(s, "Accepted").get("reason") == "NameTaken")
        assert f"{kind} '{name}' exists" in said(status, "Accepted")["message"]
        assert await world.kube.get(kind, namespace, name) == before


@pytest.mark.parametrize("beside", [("other",), ()], ids=["two members", "one member"])
async def test_a_version_rolled_back_and_one_that_is_broken_leave_the_former(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path], tmp_path: Path, beside: tuple[str, ...]
) -> None:
    """Versions that are planned alike share a matrix: whose it is, each return decides."""
    async with operating(control_plane, namespace) as world:
        others = [member(name, files["a"]) for name in beside]
        for name in "aba":
            await world.apply(resource("tiny", [member("m", files[name]), *others], devices=ONE))
            await world.until_ready("tiny")
            assert (await world.plan("tiny"))["sources"][0]["uri"] == files[name].as_uri()
        broken = tmp_path / "broken.pt2"
        broken.write_bytes(b"this is no model")
        await world.apply(resource("tiny", [member("m", broken), *others], devices=ONE))
        status = await world.until(
            "tiny", lambda s: said(s, "Degraded")["status"] == "True" and said(s, "RolloutBlocked")["reason"] == "Done"
        )
        assert "member m: " in said(status, "Degraded")["message"]
        assert "its former version goes on" in said(status, "Degraded")["message"]
        assert [source["uri"] for source in (await world.plan("tiny"))["sources"]] == [
            files["a"].as_uri() for _ in ("m", *beside)
        ]
        assert "outputs" in await world.ask("tiny", [[0.5] * 64])


async def test_pods_that_nobody_can_create_are_missed(
    control_plane: ControlPlane, namespace: str, files: dict[str, Path]
) -> None:
    async with operating(control_plane, namespace) as world:
        metadata = {"name": "small", "namespace": namespace}
        limits = {"limits": [{"type": "Container", "max": {"cpu": "1m"}}]}
        await world.kube.create({"apiVersion": "v1", "kind": "LimitRange", "metadata": metadata, "spec": limits})
        await world.apply(resource("tiny", [member("a", files["a"])], devices=ONE))
        status = await world.until("tiny", lambda s: said(s, "DevicesAcquired").get("reason") == "PodsNotCreated")
        wanted = "0 of 1 pods exist: kubectl describe statefulset tiny-worker says why"
        assert wanted in said(status, "DevicesAcquired")["message"]
        status = await world.until("tiny", lambda s: said(s, "Ready").get("reason") == "PodsNotCreated")
        assert "pods of Deployment tiny-gateway cannot be created: " in said(status, "Ready")["message"]
        await world.kube.ask("DELETE", path_of("LimitRange", namespace, "small"))
        await world.until("tiny", lambda s: said(s, "DevicesAcquired")["status"] == "True")
