"""Who is let in over ZeroMQ: CURVE and the listed key."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import zmq

from ensemble_contract.keys import KeyFiles
from ensemble_gateway.links import SILENCE_S
from tests.support.link_pairs import DEADLINE_S, Gateway, gateway, running, worker_at
from tests.support.link_strangers import Linker


def key_pairs() -> tuple[KeyFiles, KeyFiles]:
    """The worker's and the gateway's."""
    (worker_public, worker_secret), (gateway_public, gateway_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    return KeyFiles(worker_public, worker_secret, gateway_public), KeyFiles(
        gateway_public, gateway_secret, worker_public
    )


async def test_the_listed_key_is_admitted(address: str, linker: Linker) -> None:
    worker_keys, gateway_keys = key_pairs()
    worker = worker_at(address, keys=worker_keys)
    async with running(worker), gateway(linker(address, gateway_keys)) as owner:
        await owner.run(200, cancel=0.1)
        assert owner.lost == []


def wrong_keys(gateway_keys: KeyFiles) -> dict[str, KeyFiles | None]:
    public, secret = zmq.curve_keypair()
    return {
        "unlisted": replace(gateway_keys, own_public=public, own_secret=secret),
        "wrong server": replace(gateway_keys, peer_public=public),
        "none": None,
    }


@pytest.mark.parametrize("which", ["unlisted", "wrong server", "none"])
async def test_other_keys_are_refused(
    address: str, linker: Linker, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unlisted key knows the server's public key, which CURVE alone would admit."""
    worker_keys, gateway_keys = key_pairs()
    worker = worker_at(address, keys=worker_keys)
    async with running(worker), gateway(linker(address, gateway_keys)) as owner:
        refused = Gateway()
        refused.link = linker(address, wrong_keys(gateway_keys)[which])(refused)
        try:
            refused.link.start()
            await refused.until(lambda: "worker-0 cannot be used" in caplog.text, timeout_s=SILENCE_S + 2)
            assert worker.gateways == 1
            assert (refused.states, refused.link.connected) == ([], False)
            if which == "unlisted":
                assert "the handshake failed" in caplog.text
        finally:
            refused.close()
        await owner.run(20)
        assert owner.lost == []


async def test_a_gateway_refused_before_its_first_message_is_let_in_with_other_keys(
    address: str, linker: Linker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its thread is held up between `connect` and what it says first, for so long that the worker's answer is there."""
    worker_keys, gateway_keys = key_pairs()
    unlisted = wrong_keys(gateway_keys)["unlisted"]
    assert unlisted is not None
    keys = [unlisted, unlisted, gateway_keys]
    connect = zmq.Socket.connect

    def connect_and_be_refused(sock: zmq.Socket[bytes], endpoint: str) -> object:
        connected = connect(sock, endpoint)
        if sock.type == zmq.DEALER and keys:
            deadline = time.monotonic() + DEADLINE_S
            while sock.poll(1, zmq.POLLOUT):
                assert time.monotonic() < deadline
                time.sleep(0.001)
        return connected

    monkeypatch.setattr(zmq.Socket, "connect", connect_and_be_refused)
    worker = worker_at(address, keys=worker_keys)
    async with running(worker), gateway(linker(address, lambda: keys.pop(0))) as owner:
        assert "the handshake failed" in caplog.text
        assert keys == []
        await owner.run(20)


async def test_a_worker_without_keys_refuses_a_gateway_with_keys(
    address: str, linker: Linker, caplog: pytest.LogCaptureFixture
) -> None:
    _, gateway_keys = key_pairs()
    async with running(worker_at(address)) as worker:
        refused = Gateway()
        refused.link = linker(address, gateway_keys)(refused)
        try:
            refused.link.start()
            await refused.until(lambda: "worker-0 cannot be used" in caplog.text, timeout_s=SILENCE_S + 2)
            assert worker.gateways == 0
        finally:
            refused.close()
