"""Workers by name, and keys that change: what a link over ZeroMQ does when a pod or a Secret is replaced."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
import zmq

from ensemble_contract.keys import KeyFiles
from ensemble_gateway.links import SILENCE_S
from tests.support.link_pairs import Gateway, free_port, gateway, running, worker_at
from tests.support.link_strangers import Linker


async def test_the_systems_names_are_found(linker: Linker) -> None:
    port = free_port()
    async with running(worker_at(f"tcp://127.0.0.1:{port}")), gateway(linker(f"tcp://localhost:{port}")) as owner:
        await owner.run(5)


async def test_ipv6_by_address_and_by_name(linker: Linker) -> None:
    port = free_port()
    try:
        worker = worker_at(f"tcp://[::1]:{port}")
        worker.start()
    except OSError:
        pytest.skip("this machine has no IPv6")
    try:
        async with gateway(linker(f"tcp://[::1]:{port}")) as owner:
            await owner.run(5)
        async with gateway(linker(f"tcp://pod.example:{port}", lookup=lambda _: ["::1"])) as owner:
            await owner.run(5)
    finally:
        worker.stop()


async def test_a_replaced_pod_is_found_by_its_new_address(linker: Linker) -> None:
    port = free_port()
    addresses = {"pod.example": ["127.0.0.1"]}
    asked: list[float] = []

    def lookup(name: str) -> list[str]:
        asked.append(time.monotonic())
        return addresses[name]

    first, second = worker_at(f"tcp://127.0.0.1:{port}"), worker_at(f"tcp://127.0.0.2:{port}")
    first.start()
    second.start()
    try:
        async with gateway(linker(f"tcp://pod.example:{port}", lookup=lookup)) as owner:
            await owner.run(5)
            addresses["pod.example"] = ["127.0.0.2"]
            first.stop()
            await owner.until(lambda: len(owner.lost) == 1 and len(owner.states) == 2)
            before = second.batches
            await owner.run(5)
            assert second.batches == before + 5
    finally:
        second.stop()
    assert len(asked) == 2


async def test_of_several_addresses_each_is_tried(linker: Linker) -> None:
    port = free_port()
    link = linker(f"tcp://pod.example:{port}", lookup=lambda _: ["127.0.0.9", "127.0.0.1"])
    async with running(worker_at(f"tcp://127.0.0.1:{port}")):
        owner = Gateway()
        owner.link = link(owner)
        owner.link.start()
        try:
            await owner.until(lambda: bool(owner.states), timeout_s=2 * SILENCE_S + 4)
        finally:
            owner.close()


async def test_an_unknown_name_is_tried_once_a_second_and_logged_once(
    linker: Linker, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    asked: list[float] = []

    def lookup(_name: str) -> list[str]:
        asked.append(time.monotonic())
        if len(asked) < 3:
            raise OSError("no such name")
        return ["127.0.0.1"]

    async with (
        running(worker_at(f"tcp://127.0.0.1:{port}")),
        gateway(linker(f"tcp://pod.example:{port}", lookup=lookup)) as owner,
    ):
        await owner.run(5)
    assert len(asked) == 3
    assert min(later - earlier for earlier, later in itertools.pairwise(asked)) > 0.95
    assert caplog.text.count("its name pod.example cannot be resolved: no such name") == 1


def pairs() -> tuple[KeyFiles, KeyFiles]:
    """The keys of a worker and of a gateway that know each other."""
    worker, client = zmq.curve_keypair(), zmq.curve_keypair()
    return KeyFiles(*worker, client[0]), KeyFiles(*client, worker[0])


async def test_a_session_goes_on_with_its_keys_and_the_next_has_the_new_ones(linker: Linker) -> None:
    """Whoever has the new Secret first waits for the other: nothing is lost until the worker rebinds."""
    address = f"tcp://127.0.0.1:{free_port()}"
    old_worker, old_gateway = pairs()
    new_worker, new_gateway = pairs()
    keys = [old_gateway]
    async with (
        running(worker_at(address, keys=old_worker)),
        gateway(linker(address, keys=lambda: keys[0])) as owner,
    ):
        keys[0] = new_gateway
        await owner.run(20)
        assert owner.lost == []
    keys[0] = old_gateway
    first = worker_at(address, keys=old_worker)
    first.start()
    async with gateway(linker(address, keys=lambda: keys[0])) as owner:
        await owner.run(5)
        first.stop()
        await owner.until(lambda: len(owner.lost) == 1)
        async with running(worker_at(address, keys=new_worker)):
            await asyncio.sleep(1.2)
            assert len(owner.states) == 1, "with the old keys it is not let in"
            keys[0] = new_gateway
            await owner.until(lambda: len(owner.states) == 2)
            await owner.run(20)
