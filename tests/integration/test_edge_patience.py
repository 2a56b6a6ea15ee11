"""How the public port treats clients that are slow, silent, greedy or deaf, and how it ends."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import numpy as np
import pytest

from ensemble_gateway.admission import RECEIVED_AT_ONCE_BYTES, Limits
from tests.support.data_plane import GatewayProcess, LocalGateway, Workers, gateway_process, serving
from tests.support.http_client import WIDTH, get, infer, infer_json, post, rows
from tests.support.plane_members import TIMES

METADATA = get("/v2")
SHORT = Limits(stall_s=0.3, slowest_bytes_per_s=1e6, idle_s=0.8, linger_s=0.1)
MAX_BODY_BYTES = 80 << 20


@pytest.fixture
async def hasty(workers: Workers) -> AsyncIterator[LocalGateway]:
    """A port with little patience."""
    async with serving(workers.plan(*TIMES), SHORT) as found:
        yield found


@pytest.mark.parametrize("length", [3, 60, -10])
async def test_a_request_that_does_not_arrive(hasty: LocalGateway, length: int) -> None:
    async with await hasty.connect() as client:
        reply = await client.ask(infer(rows(2))[:length], within_s=5)
        assert reply.status == 408
        assert "did not arrive in time" in reply.error
        assert await client.ended(within_s=5)


async def test_trickling_does_not_help(hasty: LocalGateway) -> None:
    """Time counts from a request's first byte, so that a byte now and then does not keep a connection."""
    for request in (METADATA, infer(rows(2))[:-2]):
        async with await hasty.connect() as client:
            answer = asyncio.create_task(client.reply(within_s=5))
            for byte in request:
                if answer.done():
                    break
                client.send(bytes([byte]))
                await asyncio.sleep(0.05)
            assert (await answer).status == 408


async def test_a_slow_body_within_the_limits_arrives(workers: Workers) -> None:
    """It takes longer than a request may stall, and arrives faster than the slowest rate."""
    x = rows(20_000)
    request = infer(x)
    limits = Limits(stall_s=1.0, slowest_bytes_per_s=len(request) / 4)
    async with serving(workers.plan(*TIMES), limits) as local, await local.connect() as client:
        for at in range(0, len(request), len(request) // 8 + 1):
            client.send(request[at : at + len(request) // 8 + 1])
            await asyncio.sleep(0.2)
        np.testing.assert_allclose((await client.reply()).y(), 2 * x, rtol=1e-5)


@pytest.mark.parametrize("first", [b"", infer(rows(1)), METADATA, b"chunked"])
async def test_idle_connections_are_closed(hasty: LocalGateway, first: bytes) -> None:
    if first == b"chunked":
        body = infer_json(rows(1))
        first = post(b"", Content_Length=None, Transfer_Encoding="chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (
            len(body),
            body,
        )
    async with await hasty.connect() as client:
        if first:
            assert (await client.ask(first)).status == 200
        began = asyncio.get_running_loop().time()
        assert await client.ended(within_s=5)
        assert asyncio.get_running_loop().time() - began > 0.6


async def test_a_connection_in_use_is_not_closed(hasty: LocalGateway) -> None:
    """Neither by the edge, nor by a timer that aiohttp has started after its request."""
    async with await hasty.connect() as client:
        assert (await client.ask(METADATA)).status == 200
        deadline = asyncio.get_running_loop().time() + 2.5
        while asyncio.get_running_loop().time() < deadline:
            assert (await client.ask(infer(rows(1)))).status == 200
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_a_client_that_never_reads(workers: Workers) -> None:
    """Answers that are not taken stop the reading of its requests, and after a while the connection is broken."""
    limits = Limits(stall_s=2.0, linger_s=0.1)
    async with serving(workers.plan(*TIMES), limits) as local:
        for request in (infer(rows(8000), model="echo.times1"), get("/metrics") * 2000):
            assert 0 < await flood(local, request) < 1 << 20
        assert local.gateway.pipeline.engine.store.used_rows == 0


async def flood(local: LocalGateway, request: bytes) -> int:
    """Send a request again and again until the connection is broken; the most bytes kept for it at a time."""
    edge = local.port.edge
    sock = socket.create_connection(("127.0.0.1", local.number))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    most_kept, left = 0, b""
    try:
        async with asyncio.timeout(60):
            while not edge.connections:
                await asyncio.sleep(0)
            while edge.connections:
                with contextlib.suppress(BlockingIOError):
                    left = left or request
                    left = left[sock.send(left) :]
                await asyncio.sleep(0)
                kept = sum(t.get_write_buffer_size() for t in edge.connections if isinstance(t, asyncio.WriteTransport))
                most_kept = max(most_kept, kept)
    except ConnectionError:
        pass
    finally:
        sock.close()
    return most_kept


async def test_a_slow_reader_gets_everything(hasty: LocalGateway) -> None:
    """It takes longer than the patience with a reader that takes nothing."""
    x = rows(8000)
    reader, writer = await asyncio.open_connection("127.0.0.1", hasty.number, limit=4096)
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    writer.write(infer(x, model="echo.times2") + infer(x[:1]))
    received = b""
    for _ in range(12):
        received += await asyncio.wait_for(reader.read(15_000), 5)
        await asyncio.sleep(0.1)
    while more := await asyncio.wait_for(reader.read(1 << 20), 5):
        received += more
    assert received.count(b"HTTP/1.1 200 OK") == 2
    np.testing.assert_allclose(np.frombuffer(received[-4 * WIDTH :], "<f4"), 2 * x[0], rtol=1e-5)
    writer.close()


async def test_large_bodies_take_turns(workers: Workers) -> None:
    """Bodies beyond what may come at once wait, in order, and all are answered; what has not its turn is not read."""
    request = post(bytes(4 << 20), Inference_Header_Content_Length=10)
    async with serving(workers.plan(*TIMES), max_body_bytes=MAX_BODY_BYTES) as local:
        clients = [await local.connect() for _ in range(40)]
        asking = asyncio.gather(*(client.ask(request, 30) for client in clients))
        most = 0
        while not asking.done():
            most = max(most, sum(connection.waiting_bytes for connection in local.port.edge.connections.values()))
            await asyncio.sleep(0.001)
        replies = await asking
    assert {reply.status for reply in replies} == {400}
    assert all("JSON cannot be read" in reply.error for reply in replies)
    assert RECEIVED_AT_ONCE_BYTES / 2 < most < RECEIVED_AT_ONCE_BYTES + 40 * (256 << 10)


async def test_a_client_that_leaves_while_it_waits_frees_its_turn(workers: Workers) -> None:
    async with serving(workers.plan(*TIMES), max_body_bytes=MAX_BODY_BYTES) as local:
        # The first claims all that may come at once; the second waits behind it, and so does the third.
        clients = [await local.connect() for _ in range(3)]
        for client, size in zip(clients, (60 << 20, 20 << 20, 1 << 20), strict=True):
            client.send(post(b"", Content_Length=size, Inference_Header_Content_Length=10))
            client.send(b"x" * 1000)
            await asyncio.sleep(0.05)
        clients[1].close()
        clients[0].close()
        clients[2].send(b"x" * ((1 << 20) - 1000))
        assert (await clients[2].reply(within_s=5)).status == 400
        clients[2].close()


async def test_drain_answers_what_was_asked(workers: Workers) -> None:
    """In flight or half received: answered, with `Connection: close`; idle: closed; new: refused."""
    async with serving(workers.plan(*TIMES)) as local:
        idle, lent, half, flying = [await local.connect() for _ in range(4)]
        for client in (idle, lent):
            assert (await client.ask(infer(rows(1)))).status == 200
        assert (await lent.ask(METADATA)).status == 200
        x = rows(3)
        half.send(infer(x)[:-5])
        await half.writer.drain()
        await asyncio.sleep(0.05)
        flying.send(infer(x))
        while not local.gateway.pipeline.in_flight:
            await asyncio.sleep(0)
        local.gateway.drain()
        draining = asyncio.create_task(local.port.drain(10))
        assert await idle.ended(within_s=2)
        assert await lent.ended(within_s=2)
        half.send(infer(x)[-5:])
        for client in (flying, half):
            reply = await client.reply()
            assert reply.headers["connection"] == "close"
            np.testing.assert_allclose(reply.y(), 2 * x, rtol=1e-5)
            assert await client.ended(within_s=2)
        assert await draining
        with pytest.raises(ConnectionError):
            await local.connect()


async def test_drain_breaks_what_takes_too_long(workers: Workers) -> None:
    async with serving(workers.plan(*TIMES)) as local:
        client = await local.connect()
        client.send(infer(rows(1))[:-1])
        await asyncio.sleep(0.05)
        assert not await local.port.drain(0.2)
        assert await client.ended(within_s=2)


async def test_sigterm_drains_and_exits(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("g")
    with gateway_process(folder, workers.plan(*TIMES)) as gateway:
        await _terminate_under_load(gateway)
    assert "Traceback" not in gateway.text()


async def _terminate_under_load(gateway: GatewayProcess) -> None:
    answered, statuses = asyncio.Event(), set()

    async def ask_on() -> bytes:
        """Ask until told to go; every answer must be whole."""
        async with await gateway.connect() as client:
            while True:
                try:
                    client.send(infer(rows(2)))
                    reply = await client.reply()
                except (ConnectionError, asyncio.IncompleteReadError) as error:
                    # Between two requests the server may close; never within an answer.
                    return getattr(error, "partial", b"")
                statuses.add(reply.status)
                answered.set()
                if reply.headers.get("connection") == "close":
                    return b""

    tasks = [asyncio.create_task(ask_on()) for _ in range(16)]
    await asyncio.wait_for(answered.wait(), 10)
    gateway.process.terminate()
    partial = await asyncio.wait_for(asyncio.gather(*tasks), 15)
    assert partial == [b""] * 16
    assert statuses == {200}
    assert await asyncio.to_thread(gateway.wait) == 0
