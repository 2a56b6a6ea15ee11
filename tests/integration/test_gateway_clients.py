"""What clients cost a gateway: many of them, those that hang up, and those that send large JSON."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.data_plane import GatewayProcess, Workers, gateway_process, wait_until
from tests.support.descriptors import soft_limit
from tests.support.http_client import get, infer, infer_json, post, rows
from tests.support.plane_members import MLPS, TIMES, mlp_outputs


@pytest.fixture(scope="module")
def gateway(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with gateway_process(tmp_path_factory.mktemp("clients"), workers.plan(*MLPS)) as found:
        yield found


async def test_clients_that_hang_up_leave_nothing(gateway: GatewayProcess) -> None:
    """1,000 clients leave in the middle of their requests; store, connections and memory are as before."""
    request = infer(rows(600))

    async def hang_up(seed: int) -> None:
        chance = random.Random(seed)
        async with await gateway.connect() as client:
            client.send(request[: chance.choice((10, 200, len(request) - 1, len(request)))])
            await asyncio.sleep(chance.random() * 0.02)
            if chance.random() < 0.5:
                client.writer.transport.abort()

    async def thousand() -> int:
        for start in range(0, 1000, 50):
            await asyncio.gather(*(hang_up(seed) for seed in range(start, start + 50)))
        await asyncio.to_thread(wait_until, lambda: gateway.state()["storeBytes"] == 0)
        return gateway.resident_bytes()

    before = await thousand()
    descriptors = len(list((gateway.proc / "fd").iterdir()))
    after = await thousand()
    assert after - before < 4 << 20
    assert len(list((gateway.proc / "fd").iterdir())) <= descriptors + 2
    async with await gateway.connect() as client:
        np.testing.assert_allclose((await client.ask(infer(rows(1)))).y(), mlp_outputs(rows(1)).mean(0), rtol=1e-4)
    assert gateway.state()["failures"].get("CANCELED", 0) > 0


async def test_more_clients_than_the_soft_limit_of_descriptors(workers: Workers, tmp_path: Path) -> None:
    """A shell's or container's limit of 1,024, smaller here, is the least that a server may have, not the most."""
    with soft_limit(256):
        gateway = GatewayProcess(tmp_path, workers.plan(*TIMES))
    async with contextlib.AsyncExitStack() as connected:
        connected.callback(gateway.end)
        gateway.wait_ready()
        clients = [await connected.enter_async_context(await gateway.connect()) for _ in range(400)]
        for client in clients:
            assert (await client.ask(infer(rows(1)))).status == 200


@pytest.mark.slow
async def test_json_tensors_are_kept_once_and_not_after(gateway: GatewayProcess) -> None:
    """Nothing that was parsed before is remembered with its tensors."""
    body = post(infer_json(rows(2000), parameters={"binary_data_output": True}))
    async with await gateway.connect() as client:
        for _ in range(20):
            await client.ask(body)
        before = gateway.resident_bytes()
        for _ in range(150):
            assert (await client.ask(body)).status == 200
    # 150 times the 64 kB of its rows would be 9 MiB.
    assert gateway.resident_bytes() - before < 4 << 20


@pytest.mark.slow
async def test_large_json_does_not_hold_up_the_others(workers: Workers, tmp_path: Path) -> None:
    """Megabytes of it, asked and answered, take long; the event loop answers others meanwhile."""
    x = rows(30_000)
    body = post(infer_json(x))
    worst_s = 0.0
    with gateway_process(tmp_path, workers.plan(*TIMES, max_queue_bytes=32 << 20)) as gateway:
        async with await gateway.connect() as large, await gateway.connect() as small:
            loop = asyncio.get_running_loop()
            began = loop.time()
            large.send(body)
            answer = asyncio.create_task(large.reply())
            while not answer.done():
                at = loop.time()
                assert (await small.ask(get("/v2/health/live"))).status == 200
                worst_s = max(worst_s, loop.time() - at)
            took_s = loop.time() - began
            np.testing.assert_allclose((await answer).y(), 2 * x, rtol=1e-5)
    assert worst_s < took_s / 2
