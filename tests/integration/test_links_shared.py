"""The link in shared memory: gateway and worker with a real socket, real rings, real descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble_gateway.links import shared
from tests.support.descriptors import descriptors_left, open_descriptors
from tests.support.link_members import BIG_INPUTS, INSTANCES
from tests.support.link_pairs import BATCH_ROWS, Gateway, gateway, mapped, running, worker_at, worker_process
from tests.support.link_strangers import (
    RING,
    shared_link,
)


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, for a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        yield Path(folder) / "data.sock"


async def test_thousands_of_batches_of_random_ranges(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")), gateway(shared_link(path)) as owner:
        await owner.run(3000, cancel=0.2)
        assert owner.checked_rows > 20_000
        assert owner.lost == []


@pytest.mark.parametrize("copies", [False, True])
async def test_several_instances_in_one_run(path: Path, copies: bool) -> None:
    """Members that see the same rows: one RUN, one RESULT, every output of each of them in its place."""
    async with running(worker_at(f"unix:{path}", copies=copies)) as worker, gateway(shared_link(path)) as owner:
        await owner.run(400, most_members=6, cancel=0.1)
        for instances in (INSTANCES, reversed(INSTANCES), [64, 1, 33]):
            owner.send(5, 1, BATCH_ROWS - 6, instances=list(instances))
        await owner.until(lambda: not owner.in_flight)
        assert (owner.wrong, owner.lost) == ([], [])
        assert worker.batches == owner.answered == 403


async def test_gateways_share_a_worker(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, contextlib.AsyncExitStack() as stack:
        owners = [await stack.enter_async_context(gateway(shared_link(path), seed=seed)) for seed in range(4)]
        await asyncio.gather(*(owner.run(400, cancel=0.1) for owner in owners))
        assert worker.gateways == 4
        assert [owner.lost for owner in owners] == [[]] * 4


@pytest.mark.parametrize("copies", [False, True])
async def test_a_worker_without_batches_sleeps(path: Path, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it stays awake for a moment after each batch, with the core for whoever wants it; on a GPU never."""
    yields = 0
    sched_yield = os.sched_yield

    def counted() -> None:
        nonlocal yields
        yields += 1
        sched_yield()

    monkeypatch.setattr(os, "sched_yield", counted)
    async with running(worker_at(f"unix:{path}", copies=copies)), gateway(shared_link(path)) as owner:
        await owner.run(20)
        assert (yields > 0) == (not copies)
        await asyncio.sleep(0.3)
        settled = yields
        await asyncio.sleep(0.3)
        assert yields == settled
        await owner.run(20)
        assert owner.lost == []


async def test_big_rows(path: Path) -> None:
    async with (
        running(worker_at(f"unix:{path}", inputs=BIG_INPUTS)),
        gateway(shared_link(path), slots=48, inputs=BIG_INPUTS) as owner,
    ):
        await owner.run(60, most_rows=16)


async def test_device_with_a_cache_smaller_than_the_store(path: Path) -> None:
    worker = worker_at(f"unix:{path}", cache_rows=2 * BATCH_ROWS, copies=True)
    async with running(worker), gateway(shared_link(path), slots=1024) as owner:
        await owner.run(1500, in_flight=12, cancel=0.3)
        assert owner.lost == []


async def test_more_batches_than_the_ring_has_room_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds no room waits; it is not lost and does not end the link."""
    monkeypatch.setattr(shared, "RING_BYTES", RING)
    async with running(worker_at(f"unix:{path}")), gateway(shared_link(path), slots=4096) as owner:
        for _ in range(80):
            owner.send(*[1, 2] * (BATCH_ROWS // 3), flush=False)
        assert 80 * 8 * 2 * (BATCH_ROWS // 3) > 3 * RING
        assert owner.link is not None
        owner.link.flush()
        await owner.until(lambda: owner.answered == 80)
        assert owner.wrong == []


async def test_slots_are_reused_while_batches_are_in_flight(path: Path) -> None:
    """Rows given up under a running batch leave wrong rows nowhere but in their own, dead place."""
    worker = worker_at(f"unix:{path}", cache_rows=64, copies=True)
    async with running(worker), gateway(shared_link(path), slots=64) as owner:
        for _ in range(100):
            worker.gate.clear()
            first = owner.send(3, 3, 3)
            assert first is not None
            for entry in first.entries[:2]:
                owner.free(entry.request)
            assert owner.send(2, 4) is not None
            worker.open_gate()
            await owner.until(lambda: not owner.in_flight)
        assert owner.wrong == []
        assert owner.checked_rows >= 100 * 9


@pytest.mark.parametrize("free", range(7))
async def test_a_gateway_without_descriptors_tries_again(path: Path, free: int) -> None:
    """Its socket, two doorbells, memory and a mapping of it need five, of which so many are there at first."""
    with worker_process(f"unix:{path}"):
        async with gateway(shared_link(path)) as first:
            await first.run(1)
        del first
        gc.collect()
        owner = Gateway()
        try:
            link = owner.link = shared_link(path)(owner)
            before = open_descriptors()
            with descriptors_left(free):
                link.start()
            assert (open_descriptors() == before) == (free < 5)
            await owner.until(lambda: bool(owner.states))
            await owner.run(20)
        finally:
            owner.close()


async def test_worker_that_leaves_is_lost_once_and_found_again(path: Path) -> None:
    first = worker_at(f"unix:{path}")
    first.start()
    async with gateway(shared_link(path)) as owner:
        await owner.run(20)
        first.stop()
        await owner.until(lambda: bool(owner.lost))
        await asyncio.sleep(0.3)
        assert owner.lost == ["it has left"]
        assert len(owner.states) == 1
        async with running(worker_at(f"unix:{path}")):
            await owner.until(lambda: len(owner.states) == 2)
            await owner.run(20)
        await owner.until(lambda: len(owner.lost) == 2)


async def test_killed_worker_is_lost_at_once_with_its_batches(path: Path) -> None:
    with worker_process(f"unix:{path}") as process:
        async with gateway(shared_link(path)) as owner:
            await owner.run(50)
            process.kill()
            owner.send(5)
            await owner.until(lambda: bool(owner.lost), timeout_s=2)
            assert owner.lost == ["its process has ended"]
            with worker_process(f"unix:{path}"):
                await owner.until(lambda: len(owner.states) == 2)
                await owner.run(50)


async def test_gateway_that_leaves_frees_its_memory(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as staying:
        await staying.run(1)
        gc.collect()
        links, stores, descriptors = mapped("ensemble-link"), mapped("ensemble-store"), open_descriptors()
        for abrupt in (False, True):
            async with gateway(shared_link(path)) as leaving:
                await leaving.run(5)
                assert worker.gateways == 2
                worker.gate.clear()
                leaving.send(4)
                if abrupt:
                    leaving.link._session.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
                    await leaving.until(lambda lost=leaving.lost: bool(lost))  # type: ignore[misc]
            del leaving
            worker.open_gate()
            await staying.until(lambda: worker.gateways == 1)
            gc.collect()
            assert (mapped("ensemble-link"), mapped("ensemble-store")) == (links, stores)
            await staying.run(5)
        assert open_descriptors() == descriptors
