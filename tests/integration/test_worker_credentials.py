"""Keys and the admin token of a worker, as files that are replaced while it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from ensemble_contract import wire
from ensemble_contract.keys import KeyFiles
from ensemble_contract.plan import Instance, ModelSource, WorkerPlan, encode_plan
from ensemble_contract.pod import TOKEN_FILE
from tests.support.data_plane import wait_until
from tests.support.plane_members import X, Y, write_models
from tests.support.pod_worker import PodWorker


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one_plan(models: dict[str, ModelSource]) -> WorkerPlan:
    return WorkerPlan(1, "any", "pod-0", X, Y, (models["times1"],), (Instance("times1", 8),), 1 << 20)


def write(folder: Path, keys: KeyFiles | None = None, token: str = "") -> None:
    """A Secret's files, as they are now."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if keys is not None:
        keys.write(folder)
    if token:
        (folder / TOKEN_FILE).write_text(f"{token}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "keys"
    found.mkdir()
    return found


def new_keys() -> tuple[KeyFiles, KeyFiles]:
    """A worker's and a gateway's."""
    worker_public, worker_secret = zmq.curve_keypair()
    gateway_public, gateway_secret = zmq.curve_keypair()
    return (
        KeyFiles(worker_public, worker_secret, gateway_public),
        KeyFiles(gateway_public, gateway_secret, worker_public),
    )


async def greeted(address: str, keys: KeyFiles | None, within_s: float = 10.0) -> bool:
    """Whether a gateway with these keys is told a State."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        if keys is not None:
            sock.curve_publickey, sock.curve_secretkey = keys.own_public, keys.own_secret
            sock.curve_serverkey = keys.peer_public
        sock.connect(address)
        await sock.send(wire.encode_control(wire.Hello("gateway")))
        try:
            async with asyncio.timeout(within_s):
                while not isinstance(wire.decode((await sock.recv_multipart())[0]), wire.State):
                    pass
        except TimeoutError:
            return False
        return True


async def test_new_keys_are_taken_and_the_old_ones_refused(tmp_path: Path, folder: Path, one_plan: WorkerPlan) -> None:
    mine, theirs = new_keys()
    write(folder, mine, "sesame")
    worker = PodWorker(tmp_path, "pod-0", keys=folder)
    try:
        worker.wait_up()
        assert worker.ask("GET", "/v1/plan")[0] == 401
        worker.token = "sesame"
        assert worker.ask("PUT", "/v1/plan", encode_plan(one_plan))[0] == 202
        worker.wait_states({"times1": "ready"})
        assert await greeted(worker.address.address, theirs)
        assert not await greeted(worker.address.address, None, 1.0)
        mine, newer = new_keys()
        write(folder, mine, "open")
        wait_until(lambda: worker.ask("GET", "/v1/plan", token="open")[0] == 200)
        assert worker.ask("GET", "/v1/plan", token="sesame")[0] == 401
        worker.token = "open"
        assert await greeted(worker.address.address, newer)
        assert not await greeted(worker.address.address, theirs, 1.0)
        assert worker.states() == {"times1": "ready"}
        # What is no key, or none any more, changes nothing.
        (folder / "own.secret").write_text("short")
        wait_until(lambda: "the keys of before stay in use" in worker.text())
        write(folder, None, "again")
        wait_until(lambda: worker.ask("GET", "/v1/plan", token="again")[0] == 200)
        assert await greeted(worker.address.address, newer)
        assert not await greeted(worker.address.address, None, 1.0)
    finally:
        worker.end()
    assert "Traceback" not in worker.text()


async def test_a_folder_with_a_token_alone_means_no_encryption(
    tmp_path: Path, folder: Path, one_plan: WorkerPlan
) -> None:
    write(folder, None, "sesame")
    worker = PodWorker(tmp_path, "pod-0", keys=folder)
    worker.token = "sesame"
    try:
        worker.wait_up()
        assert worker.ask("PUT", "/v1/plan", encode_plan(one_plan))[0] == 202
        assert await greeted(worker.address.address, None)
    finally:
        worker.end()


@pytest.mark.parametrize(
    ("spoilt", "text"),
    [
        ("nothing", "own.public: No such file"),
        ("no secret", "own.secret: No such file"),
        ("not a key", "peer.public: not a key of 40 characters"),
        ("no token", "admin.token: not a token"),
    ],
)
def test_bad_keys_are_one_line_and_an_exit_code(tmp_path: Path, folder: Path, spoilt: str, text: str) -> None:
    if spoilt != "nothing":
        write(folder, new_keys()[0], "sesame")
    if spoilt == "no secret":
        (folder / "own.secret").unlink()
    elif spoilt == "not a key":
        (folder / "peer.public").write_text("key")
    elif spoilt == "no token":
        (folder / TOKEN_FILE).write_text("\n")
    worker = PodWorker(tmp_path, "pod-0", keys=folder)
    try:
        assert worker.wait(60) == 3
    finally:
        worker.end()
    (line,) = worker.text().splitlines()
    assert line.startswith("worker pod-0: ")
    assert text in line
