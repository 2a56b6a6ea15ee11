"""A gateway as a pod runs it: plans from a mirror and a kept copy, keys in a folder, readiness, and a gentle end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ensemble_contract.keys import OWN_PUBLIC
from ensemble_contract.plan import EnsemblePlan, GatewayPlan, encode_plan
from ensemble_contract.pod import TOKEN_FILE
from tests.support.data_plane import Child, Workers, ask_unix, wait_until
from tests.support.http_client import Client, Reply, get, infer, post, rows
from tests.support.plane_members import TIMES

START_S = 30.0


class Pod(Child):
    """A gateway process with a pod's folders below `folder`, which outlives it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.mirror = folder / "plan" / "plan.json"
        self.keys = folder / "keys"
        self.admin = folder / "admin"
        for part in (self.mirror.parent, self.keys):
            part.mkdir(exist_ok=True, parents=True)
        if not (self.keys / TOKEN_FILE).exists():
            (self.keys / TOKEN_FILE).write_text("first\n")
        arguments = ["ensemble_gateway", "--http", "127.0.0.1:0", "--admin", f"unix:{self.admin}"]
        arguments += ["--mirror", str(self.mirror), "--state-dir", str(folder / "state"), "--keys", str(self.keys)]
        super().__init__([*arguments, *options], folder / "log")
        self.number = 0

    def wait_up(self) -> None:
        def up() -> bool:
            assert self.process.poll() is None, self.text()
            with contextlib.suppress(OSError):
                return ask_unix(self.admin, "GET", "/v1/health")[0] == 200
            return False

        wait_until(up, START_S)
        self.number = int(self.state()["url"].rpartition(":")[2])

    def write_mirror(self, plan: GatewayPlan) -> None:
        """Replace the mirror as a kubelet does: another file behind the same name."""
        draft = self.folder / "draft"
        draft.write_bytes(encode_plan(EnsemblePlan(plan, (), {})))
        draft.rename(self.mirror)

    @property
    def token(self) -> str:
        return (self.keys / TOKEN_FILE).read_text().strip()

    def ask(self, method: str, target: str, body: bytes = b"", token: str | None = None) -> tuple[int, dict[str, Any]]:
        status, text = ask_unix(self.admin, method, target, body, authorization=f"Bearer {token or self.token}")
        return status, json.loads(text)

    def state(self) -> dict[str, Any]:
        return self.ask("GET", "/v1/state")[1]

    def wait_served(self, generation: int) -> None:
        def served() -> bool:
            state = self.state()
            return bool(state["generation"] == generation and state["ready"])

        wait_until(served, START_S)

    async def once(self, request: bytes) -> Reply:
        async with Client(*await asyncio.open_connection("127.0.0.1", self.number)) as client:
            return await client.ask(request)


@contextlib.contextmanager
def pod_in(folder: Path, *options: str) -> Iterator[Pod]:
    pod = Pod(folder, *options)
    try:
        pod.wait_up()
        yield pod
    finally:
        pod.end()


async def test_without_a_plan_it_lives_and_says_so_until_one_comes(workers: Workers, tmp_path: Path) -> None:
    with pod_in(tmp_path) as pod:
        assert (await pod.once(get("/v2/health/live"))).status == 200
        for request in (
            get("/v2/health/ready"),
            get("/v2"),
            get("/v2/models/echo"),
            get("/metrics"),
            infer(rows(1)),
            post(b"2\r\n{}\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        ):
            reply = await pod.once(request)
            assert (reply.status, reply.headers["retry-after"]) == (503, "2")
            assert reply.error == "this gateway has no plan yet: it serves when its first plan comes"
        state = pod.state()
        assert (state["generation"], state["newest"], state["retiring"], state["ready"]) == (0, 0, 0, False)
        assert ask_unix(pod.admin, "GET", "/v1/ready")[0] == 503
        assert pod.ask("GET", "/v1/plan")[0] == 404
        # The mirror, late and first damaged.
        pod.mirror.write_text("{")
        wait_until(lambda: "cannot be used: Input data was truncated" in pod.text(), START_S)
        pod.write_mirror(workers.plan(*TIMES))
        pod.wait_served(1)
        np.testing.assert_allclose((await pod.once(infer(rows(2)))).y(), 2 * rows(2), rtol=1e-5)
        assert ask_unix(pod.admin, "GET", "/v1/ready")[0] == 200
        assert pod.text().count("cannot be used: Input data was truncated") == 1


async def test_the_newest_plan_wins_wherever_it_is(workers: Workers, tmp_path: Path) -> None:
    plan = workers.plan(*TIMES)
    with pod_in(tmp_path) as pod:
        pod.write_mirror(plan)
        pod.wait_served(1)
        pushed = msgspec.structs.replace(plan, generation=3, rule="max")
        assert pod.ask("PUT", "/v1/plan", encode_plan(pushed)) == (202, {"generation": 3})
        assert pod.ask("PUT", "/v1/plan", encode_plan(pushed)) == (202, {"generation": 3})
        pod.wait_served(3)
        status, answer = pod.ask("PUT", "/v1/plan", encode_plan(msgspec.structs.replace(plan, generation=2)))
        assert (status, answer["error"]) == (409, "generation 2 is older than 3")
        status, answer = pod.ask("PUT", "/v1/plan", encode_plan(msgspec.structs.replace(plan, generation=3)))
        assert status == 409
        assert "generation 3 is another plan here" in answer["error"]
    # A mount lags behind: the kept plan is newer.
    with pod_in(tmp_path) as pod:
        pod.wait_served(3)
        np.testing.assert_allclose((await pod.once(infer(np.ones((1, 8), np.float32)))).y().max(), 3, rtol=1e-5)
        pod.write_mirror(msgspec.structs.replace(plan, generation=4, rule="min"))
        pod.wait_served(4)
        np.testing.assert_allclose((await pod.once(infer(np.ones((1, 8), np.float32)))).y().max(), 1, rtol=1e-5)
    # A kept plan that cannot be read is no reason to stay away.
    (tmp_path / "state" / "gateway-plan.json").write_text("nonsense")
    with pod_in(tmp_path) as pod:
        pod.wait_served(4)
        assert "cannot be used" in pod.text()


async def test_the_state_says_what_an_operator_wants_to_know(workers: Workers, tmp_path: Path) -> None:
    with pod_in(tmp_path) as pod:
        pod.write_mirror(workers.plan("times1", "mlp1"))
        pod.wait_served(1)
        state = pod.state()
        assert state["memberDigests"] == {"times1": "digest-times1", "mlp1": "digest-mlp1"}
        assert [(m["name"], m["digest"], m["instances"]) for m in state["members"]] == [
            ("times1", "digest-times1", 2),
            ("mlp1", "digest-mlp1", 2),
        ]
        for worker, process in zip(state["workers"], workers.processes, strict=True):
            assert worker["address"] == process.address.address
            assert {"member": "times2", "digest": "digest-times2", "batchSize": 32} in worker["instances"]


async def test_a_token_that_is_replaced_counts_soon(workers: Workers, tmp_path: Path) -> None:
    with pod_in(tmp_path) as pod:
        assert ask_unix(pod.admin, "GET", "/v1/state")[0] == 401
        assert ask_unix(pod.admin, "GET", "/v1/health")[0] == 200
        draft = tmp_path / "draft"
        draft.write_text("second")
        draft.rename(pod.keys / TOKEN_FILE)
        wait_until(lambda: pod.ask("GET", "/v1/state")[0] == 200, START_S)
        assert pod.ask("GET", "/v1/state", token="first")[0] == 401
        # One that goes away is no open door.
        (pod.keys / TOKEN_FILE).unlink()
        wait_until(lambda: "the former stay" in pod.text(), START_S)
        assert pod.ask("GET", "/v1/state", token="second")[0] == 200


def test_a_folder_without_keys_or_token_is_refused(tmp_path: Path) -> None:
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    arguments = ["ensemble_gateway", "--http", "127.0.0.1:0", "--admin", f"unix:{admin}", "--keys", str(keys)]
    child = Child(arguments, tmp_path / "log")
    try:
        assert child.wait() == 3
        assert f"{keys / OWN_PUBLIC}: No such file" in child.text()
    finally:
        child.end()


async def test_it_ends_gently(workers: Workers, tmp_path: Path) -> None:
    """It says that it goes, takes what still comes for a moment, answers it, and leaves."""
    with pod_in(tmp_path, "--drain-delay-s", "1.5") as pod:
        pod.write_mirror(workers.plan(*TIMES))
        pod.wait_served(1)
        pod.signal(signal.SIGTERM)
        began = time.monotonic()
        wait_until(lambda: ask_unix(pod.admin, "GET", "/v1/ready")[0] == 503)
        assert (await pod.once(get("/v2/health/ready"))).status == 503
        np.testing.assert_allclose((await pod.once(infer(rows(2)))).y(), 2 * rows(2), rtol=1e-5)
        assert ask_unix(pod.admin, "GET", "/v1/health")[0] == 200
        assert await asyncio.to_thread(pod.wait) == 0
        assert time.monotonic() - began > 1.4


@pytest.mark.parametrize("quorum", [1, 2])
async def test_ready_once_the_quorum_can_answer(workers: Workers, tmp_path: Path, quorum: int) -> None:
    """A member that never comes does not keep the others from answering where they are enough."""
    plan = workers.plan("times1", "times2", quorum=quorum)
    lacking = tuple(msgspec.structs.replace(m, digest="never") if m.name == "times2" else m for m in plan.members)
    plan = msgspec.structs.replace(plan, members=lacking)
    with pod_in(tmp_path) as pod:
        pod.write_mirror(plan)
        wait_until(lambda: any(member["live"] for member in pod.state()["members"]), START_S)
        status = 200 if quorum == 1 else 503
        assert ask_unix(pod.admin, "GET", "/v1/ready")[0] == status
        assert (await pod.once(get("/v2/health/ready"))).status == status
        assert (await pod.once(get("/v2/models/echo/ready"))).status == status
        assert (await pod.once(get("/v2/models/echo.times1/ready"))).status == 200
        assert (await pod.once(get("/v2/models/echo.times2/ready"))).status == 503
        if quorum == 1:
            np.testing.assert_allclose((await pod.once(infer(rows(2)))).y(), rows(2), rtol=1e-5)
