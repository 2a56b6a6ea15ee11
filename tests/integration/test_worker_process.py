"""The worker process: its plan, its admin API, what it does with what it cannot load, and how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ensemble_contract.plan import Instance, ModelSource, WorkerPlan, encode_plan
from tests.support.data_plane import Worker, ask_unix, gateway_plan, serving, wait_until, worker_plan
from tests.support.http_client import infer, rows
from tests.support.plane_members import write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, models: dict[str, ModelSource]) -> Iterator[Worker]:
    """A worker with two good members, and one whose file is damaged."""
    folder = tmp_path_factory.mktemp("worker")
    (folder / "bad.pt").write_bytes(b"not a model")
    bad = ModelSource("bad", "digest-bad", f"file:{folder / 'bad.pt'}", "torchscript")
    plan = worker_plan("solo", {**models, "bad": bad}, ["times1", "bad", "times2"])
    plan = msgspec.structs.replace(plan, generation=5)
    found = Worker(folder, plan, options=["--state-dir", str(folder / "state"), "--cache-dir", str(folder / "cache")])
    try:
        found.wait_ready()
        yield found
    finally:
        found.end()


def put(worker: Worker, plan: WorkerPlan | bytes) -> tuple[int, dict[str, object]]:
    body = plan if isinstance(plan, bytes) else encode_plan(plan)
    status, text = ask_unix(worker.admin, "PUT", "/v1/plan", body)
    return status, json.loads(text)


def test_a_member_that_cannot_be_loaded_leaves_the_others_running(worker: Worker) -> None:
    assert worker.states() == {"times1": "ready", "bad": "failed", "times2": "ready"}
    shown = json.loads(ask_unix(worker.admin, "GET", "/v1/plan")[1])
    error = next(one["error"] for one in shown["instances"] if one["member"] == "bad")
    assert "member 'bad'" in error
    assert "bad.pt" in error
    assert error in worker.text()


async def test_it_serves_the_others(worker: Worker, models: dict[str, ModelSource]) -> None:
    x = rows(40)
    async with (
        serving(gateway_plan([worker.address], models, "times1", "times2")) as local,
        await local.connect() as client,
    ):
        np.testing.assert_allclose((await client.ask(infer(x))).y(), 1.5 * x, rtol=1e-5)


def test_what_the_admin_api_tells(worker: Worker) -> None:
    assert ask_unix(worker.admin, "GET", "/v1/health") == (200, b'{"status":"ok"}')
    device = json.loads(ask_unix(worker.admin, "GET", "/v1/device")[1])
    assert device["overheadBytes"] > 50 << 20
    status, text = ask_unix(worker.admin, "GET", "/metrics")
    assert status == 200
    found = {
        (s.name, s.labels.get("member") or s.labels.get("state")): s.value
        for f in text_string_to_metric_families(text.decode())
        for s in f.samples
    }
    assert found["ensemble_worker_instance_ready", "times1"] == 1
    assert found["ensemble_worker_instance_ready", "bad"] == 0
    assert found["ensemble_worker_rows_total", "times1"] >= 0
    assert found["ensemble_worker_instances", "ready"] == 2
    assert found["ensemble_worker_instances", "failed"] == 1
    assert found["ensemble_worker_plan_generation", None] == 5
    assert found["ensemble_worker_held_bytes", None] > 50 << 20


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"generation": 9}', b"\xff" * 100])
def test_what_is_no_plan_is_refused(worker: Worker, text: bytes) -> None:
    status, answer = put(worker, text)
    assert status == 400
    assert answer["error"]
    assert worker.states()["times1"] == "ready"


def test_an_older_plan_is_refused(worker: Worker) -> None:
    status, answer = put(worker, msgspec.structs.replace(worker.plan, generation=4))
    assert (status, answer["error"]) == (409, "generation 4 is older than 5")
    assert put(worker, worker.plan)[0] == 202


async def test_a_newer_plan_leaves_what_stays_undisturbed(worker: Worker, models: dict[str, ModelSource]) -> None:
    """Instances of both plans answer all the while; the other ends; a new one of the same file as another begins."""
    twin = msgspec.structs.replace(models["times1"], name="twin")
    sources = (models["times1"], twin, models["times3"])
    newer = WorkerPlan(
        6, "any", "solo", worker.plan.inputs, worker.plan.outputs, sources,
        (Instance("times1", 32), Instance("twin", 32), Instance("times3", 8)),
    )  # fmt: skip
    async with serving(gateway_plan([worker.address], models, "times1")) as local, await local.connect() as client:
        assert put(worker, newer)[0] == 202
        x = rows(3)
        deadline = time.monotonic() + 30
        while set(worker.states().values()) != {"ready"}:
            np.testing.assert_allclose((await client.ask(infer(x))).y(), x, rtol=1e-5)
            assert time.monotonic() < deadline
        assert worker.states() == {"times1": "ready", "twin": "ready", "times3": "ready"}
        np.testing.assert_allclose((await client.ask(infer(x))).y(), x, rtol=1e-5)
        # What is planned no longer goes, also where another instance has the same file.
        fewer = msgspec.structs.replace(newer, generation=7, instances=newer.instances[:1], members=sources[:1])
        assert put(worker, fewer)[0] == 202
        assert set(worker.states().items()) - {("twin", "draining"), ("times3", "draining")} == {("times1", "ready")}
        wait_until(lambda: worker.states() == {"times1": "ready"})
        np.testing.assert_allclose((await client.ask(infer(x))).y(), x, rtol=1e-5)
    async with (
        serving(gateway_plan([worker.address], models, "times1", "times3"), wait=False) as local,
        await local.connect() as client,
    ):
        reply = await client.ask(infer(x, parameters={"timeout": 200_000}))
        assert (reply.status, "times3" in reply.error) == (503, True)


def test_a_restarted_worker_runs_the_newest_plan_it_had(worker: Worker, tmp_path: Path) -> None:
    """Not the older one that it was started with."""
    newest = msgspec.structs.replace(worker.plan, generation=20, instances=worker.plan.instances[:1])
    assert put(worker, newest)[0] == 202
    worker.signal(signal.SIGKILL)
    worker.wait()
    again = worker.restarted()
    try:
        again.wait_ready()
        assert again.states() == {"times1": "ready"}
        assert json.loads(ask_unix(again.admin, "GET", "/v1/plan")[1])["generation"] == 20
        again.signal(signal.SIGTERM)
        assert again.wait() == 0
    finally:
        again.end()
    assert "Traceback" not in again.text().replace("cannot be loaded\nTraceback", "")


@pytest.mark.parametrize("pushed", [True, False], ids=["the same plan again", "by itself"])
def test_a_member_that_could_not_be_fetched_is_tried_again(
    models: dict[str, ModelSource], tmp_path: Path, pushed: bool
) -> None:
    late = tmp_path / "late.pt"
    source = ModelSource("late", "digest-late", f"file:{late}", "torchscript")
    worker = Worker(tmp_path, worker_plan("solo", {"late": source}, ["late"]))
    try:
        worker.wait_ready()
        assert worker.states() == {"late": "failed"}
        late.write_bytes(Path(models["times1"].uri.removeprefix("file:")).read_bytes())
        if pushed:
            assert put(worker, worker.plan)[0] == 202
        wait_until(lambda: worker.states() == {"late": "ready"}, 40)
        assert json.loads(ask_unix(worker.admin, "GET", "/v1/plan")[1])["instances"][0]["attempts"] == 2
    finally:
        worker.end()


def test_what_cannot_pass_is_tried_again_only_when_it_is_asked_for(
    models: dict[str, ModelSource], tmp_path: Path
) -> None:
    """A file with another hash would be fetched again and again for nothing."""
    good = msgspec.structs.replace(models["times1"], name="good", digest="g")
    bad = msgspec.structs.replace(models["times1"], name="bad", digest="b", sha256="0" * 64)
    worker = Worker(tmp_path, worker_plan("solo", {"bad": bad}, ["bad"]))

    def attempts() -> dict[str, int]:
        shown = json.loads(ask_unix(worker.admin, "GET", "/v1/plan")[1])["instances"]
        return {one["member"]: one["attempts"] for one in shown if one["state"] in ("ready", "failed")}

    try:
        worker.wait_ready()
        newer = worker_plan("solo", {"bad": bad, "good": good}, ["bad", "good"])
        newer = msgspec.structs.replace(newer, generation=2)
        assert put(worker, newer)[0] == 202
        wait_until(lambda: attempts() == {"bad": 1, "good": 1})
        assert put(worker, newer)[0] == 202
        wait_until(lambda: attempts() == {"bad": 2, "good": 1})
        assert "declared is 0000" in worker.text()
    finally:
        worker.end()


def test_it_ends_in_the_middle_of_a_download(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}/model.pt"
        source = ModelSource("slow", "digest", uri, "torchscript", sha256="0" * 64)
        plan = worker_plan("solo", {"slow": source}, ["slow"])
        worker = Worker(tmp_path, plan, options=["--cache-dir", str(tmp_path / "cache")])
        try:
            listener.settimeout(60)
            connection, _ = listener.accept()
            began = time.monotonic()
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert time.monotonic() - began < 5
            connection.close()
        finally:
            worker.end()


def test_the_admin_api_wants_its_token(
    tmp_path: Path, models: dict[str, ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLE_ADMIN_TOKEN", "sesame")
    worker = Worker(tmp_path, worker_plan("solo", models, ["times1"]))
    try:
        wait_until(lambda: worker.admin.exists() or worker.process.poll() is not None, 60)
        assert ask_unix(worker.admin, "GET", "/v1/health")[0] == 200
        for given, status in ((None, 401), ("Bearer x", 401), ("Bearer s\xe9same", 401), ("Bearer sesame", 200)):
            assert ask_unix(worker.admin, "GET", "/v1/plan", authorization=given)[0] == status
    finally:
        worker.end()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--admin", "unix:/nowhere/a", "--data", "unix:/tmp/d"], 6, "cannot listen"),
        (["--data", "unix:/tmp/d"], 2, "--admin"),
        (["--device", "gpu", "--admin", "unix:/nowhere/a", "--data", "unix:/tmp/d"], 1, "must be cpu-N or cuda-N"),
        (["--threads", "0", "--admin", "unix:/nowhere/a", "--data", "unix:/tmp/d"], 2, "0 is not above 0"),
        (["--keys", "/nowhere", "--admin", "unix:/nowhere/a", "--data", "unix:/tmp/d"], 3, "/nowhere/own.public"),
    ],
)
def test_what_it_is_started_with_wrongly(arguments: list[str], code: int, message: str) -> None:
    command = [sys.executable, "-m", "ensemble_worker", "serve", "--name", "w", "--device", "cpu-0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_it_does_not_outlive_its_parent(tmp_path: Path, models: dict[str, ModelSource]) -> None:
    """A parent that is killed cannot end its children: the kernel does."""
    file = tmp_path / "plan.json"
    file.write_bytes(encode_plan(worker_plan("solo", models, ["times1"])))
    admin = tmp_path / "admin"
    command = [sys.executable, "-m", "ensemble_worker", "serve", "--name", "solo", "--device", "cpu-0"]
    command += ["--admin", f"unix:{admin}", "--data", f"unix:{tmp_path / 'data'}", "--plan", str(file), "--parent-pid"]
    script = (
        "import os, subprocess, time\n"
        f"child = subprocess.Popen([*{command!r}, str(os.getpid())])\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(admin.exists, 60)
        parent.kill()
    wait_until(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    """Whether the process runs: what nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
