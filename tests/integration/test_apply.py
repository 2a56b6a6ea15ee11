"""`ensemble apply` against a running `ensemble serve`, under load: no request fails, no answer mixes versions."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
import yaml

from tests.support.http_client import Array
from tests.support.known_answers import REQUESTS, KnownAnswers
from tests.support.models import export_mlp, make_mlp
from tests.support.serving import Served, serving

INPUTS = 8
# By file: seed and width.
MODELS = {"a": (1, 16), "b": (2, 32), "c": (3, 24), "b2": (5, 32)}
APPLY_S = 120.0


pytestmark = pytest.mark.timeout(400)


@dataclass(frozen=True)
class Shape:
    """An ensemble: by member, the file that it is from and its weight."""

    members: Mapping[str, tuple[str, float]]
    spec: Mapping[str, Any]

    def text(self, *, memory: str = "1Mi", measured: bool = False) -> str:
        """As a resource with declared profiles."""
        profile = {} if measured else {"profile": {"measurements": [_measurement(memory)]}}
        members = [
            {"name": n, "model": {"uri": f"file:models/{f}.pt2"}, "activation": "softmax", "weight": w, **profile}
            for n, (f, w) in self.members.items()
        ]
        spec = {
            "members": members,
            "input": {"name": "x", "datatype": "FP32", "shape": [INPUTS]},
            "output": {"name": "y", "datatype": "FP32", "shape": [10]},
            "combine": {"rule": "weightedMean"},
            "batching": {"maxQueueBytes": "16Mi"},
            **self.spec,
        }
        head = {"apiVersion": "ensemble-operator.io/v1alpha1", "kind": "InferenceEnsemble"}
        return yaml.safe_dump({**head, "metadata": {"name": "trio"}, "spec": spec})

    def answers(self) -> list[Array]:
        """What it answers to every request, computed in this process."""
        total = sum(weight for _, weight in self.members.values())
        with torch.inference_mode():
            return [
                torch.stack(
                    [
                        weight / total * torch.softmax(_model(file)(torch.from_numpy(x)), -1)
                        for file, weight in self.members.values()
                    ]
                )
                .sum(0)
                .numpy()
                for x in REQUESTS
            ]


def _measurement(memory: str) -> dict[str, Any]:
    return {"batchSize": 8, "memory": memory, "latency": "1ms"}


def _model(file: str) -> torch.nn.Module:
    seed, hidden = MODELS[file]
    return make_mlp(seed=seed, inputs=INPUTS, hidden=hidden)


def shape(members: str, **spec: Any) -> Shape:
    """`a b=b2 c*3`: member b from file b2, member c with weight 3."""
    found = {}
    for word in members.split():
        text, _, weight = word.partition("*")
        name, _, file = text.partition("=")
        found[name] = (file or name, float(weight or 1))
    return Shape(found, spec)


class World:
    """A folder with models, a server of the first resource, and the command that changes it."""

    def __init__(self, folder: Path, runtime: Path, served: Served) -> None:
        self.folder, self.runtime, self.served = folder, runtime, served

    @property
    def socket(self) -> Path:
        return self.runtime / "ensemble-operator" / "trio.sock"

    async def start_apply(self, wanted: Shape | str, *arguments: str) -> asyncio.subprocess.Process:
        file = self.folder / "changed.yaml"
        file.write_text(wanted if isinstance(wanted, str) else wanted.text())
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ensemble_operator", "apply", str(file), *arguments),
            env={**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    async def apply(self, wanted: Shape | str, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and error."""
        process = await self.start_apply(wanted, *arguments)
        async with asyncio.timeout(APPLY_S):
            out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def status(self) -> dict[str, Any]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with (
            aiohttp.ClientSession("http://localhost", connector=connector) as session,
            session.get("/v1/ensemble") as answer,
        ):
            found: dict[str, Any] = await answer.json()
            return found


FIRST = shape("a b c")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("apply")
    (folder / "models").mkdir()
    for name, (seed, hidden) in MODELS.items():
        export_mlp(folder / "models" / f"{name}.pt2", seed=seed, inputs=INPUTS, hidden=hidden)
    return folder


@pytest.fixture
def world(models: Path, tmp_path: Path) -> Iterator[World]:
    """The first ensemble, served on two devices."""
    (models / "ensemble.yaml").write_text(FIRST.text())
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        environment = {"XDG_RUNTIME_DIR": runtime}
        with serving(models / "ensemble.yaml", tmp_path, "--cpu-devices", "2", environment=environment) as served:
            served.wait_until_served()
            yield World(models, Path(runtime), served)
            assert served.stop(signal.SIGTERM) == 0
        assert list(Path(runtime).iterdir()) == []


def loaded(world: World, *shapes: Shape) -> KnownAnswers:
    names = {f"{at}": one.answers() for at, one in enumerate(shapes)}
    return KnownAnswers(world.served.url, "trio", names)


CHANGES = (
    ("a weight", shape("a b c*3")),
    ("a member less", shape("a c*3")),
    ("a member more", shape("a c*3 b*2")),
    ("another file", shape("a c*3 b=b2*2")),
    ("all of it", shape("b=b2 a*2")),
)


@pytest.mark.slow
async def test_under_load_no_request_fails_and_no_answer_is_mixed(world: World) -> None:
    """More than 10,000 requests over five changes."""
    load = loaded(world, FIRST, *(wanted for _, wanted in CHANGES))
    async with load.running():
        await load.only("0")
        for at, (_, wanted) in enumerate(CHANGES):
            before, total = load.answers.copy(), load.total
            code, out, err = await world.apply(wanted)
            assert code == 0, err
            assert "predicted throughput" in out
            await load.only(f"{at + 1}", max(300, 2100 - (load.total - total)))
            gained = load.answers - before
            assert set(gained) <= {f"{at}", f"{at + 1}"}, "an answer of neither the old nor the new"
    assert (load.failed, load.wrong) == ([], [])
    assert load.total > 10_000
    print(f"{load.total} requests, 0 failed, 0 wrong: {dict(load.answers)}")


@pytest.mark.slow
async def test_what_cannot_be_done_changes_nothing(world: World) -> None:
    """Each is refused with a message and an exit code, and what served goes on."""
    (world.folder / "models" / "broken.pt2").write_bytes(b"not a model")
    other_input = {"input": {"name": "x", "datatype": "FP32", "shape": [4]}}
    refusals = [
        (shape("a b c", combine={"rule": "no such"}).text(), 3, r"changed.yaml: spec.combine.rule"),
        (shape("a b c", **other_input).text(), 3, r"spec.input: cannot be changed while it serves, was x FP32 \[8\]"),
        (
            FIRST.text().replace("name: trio", "name: other"),
            1,
            r"'other' is not served on this machine: nobody answers",
        ),
        (shape("a b broken").text(measured=True), 4, r"member 'broken' \(file:.*broken.pt2\)"),
        (shape("a b broken").text(), 4, r"member 'broken' cannot be loaded: .*\n?.*what served before serves again"),
        (FIRST.text(memory="60Ti"), 5, r"fits on no device"),
    ]
    load = loaded(world, FIRST)
    async with load.running():
        for text, code, message in refusals:
            found, _, err = await world.apply(text)
            assert (found, bool(re.search(message, err))) == (code, True), err
            assert "Traceback" not in err
        await load.only("0")
        code, out, _ = await world.apply(FIRST)
        assert (code, out.strip()) == (0, "trio is as wanted already")
    assert (load.failed, load.wrong) == ([], [])
    code, _, err = await world.apply(FIRST.text().replace("name: trio", "name: other"), "--socket", str(world.socket))
    assert code == 1
    assert "is 'other', and 'trio' is served here" in err


@pytest.mark.slow
async def test_ctrl_c_in_the_middle_leaves_a_server_that_serves(world: World) -> None:
    wanted = shape("a b=b2 c")
    load = loaded(world, FIRST, wanted)
    async with load.running():
        process = await world.start_apply(wanted)
        assert process.stderr is not None
        async with asyncio.timeout(APPLY_S):
            while b"step 1" not in await process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            # It may have been quicker than the signal.
            assert await process.wait() in (0, 130)
            while (await world.status())["phase"] == "Changing":
                await asyncio.sleep(0.05)
        await load.only("1")
        status = await world.status()
        assert status["phase"] == "Ready"
        assert status["members"] == {"total": 3, "live": 3, "summary": "3/3"}
        code, _, err = await world.apply(FIRST)
        assert code == 0, err
        await load.only("0")
    assert (load.failed, load.wrong) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "gateway"])
async def test_a_process_that_dies_during_a_change_is_waited_for(world: World, victim: str) -> None:
    wanted = shape("a b=b2 c")
    load = loaded(world, FIRST, wanted)
    process = await world.start_apply(wanted)
    assert process.stderr is not None
    async with asyncio.timeout(APPLY_S):
        while b"step 1" not in await process.stderr.readline():
            pass
        if victim == "worker":
            world.served.worker("cpu-1").kill()
        else:
            next(c for c in world.served.children() if "ensemble_gateway" in c.cmdline()).kill()
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"replaced b" in out
    async with load.running():
        await load.only("1")
    assert (load.failed, load.wrong) == ([], [])


@pytest.mark.slow
async def test_without_room_for_both_versions_nothing_changes_unless_it_may_pause(world: World) -> None:
    """Profiles that fill the devices: a new version beside the old one fits nowhere."""
    capacity = (await world.status())["allocation"]["rows"][0]["capacityBytes"]
    memory = f"{int(capacity * 0.5)}"
    tight = shape("a b")
    code, _, err = await world.apply(tight.text(memory=memory))
    assert code == 0, err
    wanted = shape("a=c b=b2")
    code, _, err = await world.apply(wanted.text(memory=memory))
    assert code == 5
    assert "there is no order of changes that fits the memory" in err
    load = loaded(world, tight, wanted)
    async with load.running():
        await load.only("0")
        paused = Shape(wanted.members, {"rollout": "Pause"})
        code, _, err = await world.apply(paused.text(memory=memory))
        assert code == 0, err
        assert "hold requests" in err
        await load.only("1")
    assert (load.failed, load.wrong) == ([], [])


async def test_nobody_serves(models: Path, tmp_path: Path) -> None:
    """No server, one that has died, and a file that is none."""
    world = World(models, tmp_path, None)  # type: ignore[arg-type]
    code, _, err = await world.apply(FIRST)
    assert code == 1
    assert f"'trio' is not served on this machine: nobody answers at {world.socket}" in err
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(short / "dead.sock"))
        code, _, err = await world.apply(FIRST, "--socket", str(short / "dead.sock"))
        assert (code, "nobody answers at" in err) == (1, True)
    finally:
        shutil.rmtree(short)
    code, _, err = await world.apply("kind: Nothing")
    assert (code, "changed.yaml" in err) == (3, True)


@pytest.mark.slow
def test_a_second_server_of_the_same_name_serves_and_cannot_be_reached(world: World, tmp_path: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": str(world.runtime)}
    file = world.folder / "ensemble.yaml"
    with serving(file, tmp_path, "--cpu-devices", "1", environment=environment) as second:
        second.wait_until_served()
        second.wait_for(
            r"`ensemble apply` cannot change this server: .*trio.sock: another server listens there", second.err
        )
        assert second.stop(signal.SIGTERM) == 0
    assert world.socket.exists()
    with serving(file, tmp_path, "--socket", str(world.socket), environment=environment) as third:
        assert third.process.wait(60) == 6
