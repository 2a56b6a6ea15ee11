"""The public port over real sockets, in this event loop, before real workers."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest

from ensemble_gateway.reading import Reading
from tests.support.data_plane import LocalGateway, Workers, serving
from tests.support.http_client import Client, get, infer, infer_json, post, rows
from tests.support.plane_members import TIMES

METADATA = get("/v2/models/echo")


@pytest.fixture
async def edge(workers: Workers) -> AsyncIterator[LocalGateway]:
    async with serving(workers.plan(*TIMES)) as found:
        yield found


@pytest.fixture
async def client(edge: LocalGateway) -> AsyncIterator[Client]:
    async with await edge.connect() as found:
        yield found


async def works(client: Client, seed: int = 1) -> None:
    """The connection still answers, rightly."""
    x = rows(2, seed)
    np.testing.assert_allclose((await client.ask(infer(x))).y(), 2 * x, rtol=1e-5)


async def test_pipelined_requests_are_answered_in_order(client: Client) -> None:
    inputs = [rows(1 + i % 7, i) for i in range(200)]
    client.send(b"".join(infer(x) for x in inputs))
    for x in inputs:
        np.testing.assert_allclose((await client.reply()).y(), 2 * x, rtol=1e-5)


async def test_pipelined_kinds_are_answered_in_order(client: Client) -> None:
    """Inferences, requests for aiohttp and refusals, all sent before the first answer is read."""
    x = rows(3)
    client.send((infer(x) + METADATA + post(b"{") + get("/nowhere") + post(b"xx", target="/v2/none")) * 20)
    for _ in range(20):
        np.testing.assert_allclose((await client.reply()).y(), 2 * x, rtol=1e-5)
        assert json.loads((await client.reply()).body)["name"] == "echo"
        assert [(await client.reply()).status for _ in range(3)] == [400, 404, 404]


async def test_a_connection_alternates_between_the_edge_and_aiohttp(edge: LocalGateway, client: Client) -> None:
    for seed in range(5):
        assert json.loads((await client.ask(METADATA)).body)["name"] == "echo"
        await works(client, seed)
        compressed = gzip.compress(infer_json(rows(1, seed)))
        reply = await client.ask(post(compressed, Content_Encoding="gzip", Content_Type="application/json"))
        np.testing.assert_allclose(reply.y(), 2 * rows(1, seed), rtol=1e-5)
        await works(client, seed)
        assert (await client.ask(post(b"[" * 300, target="/v2/health/live"))).status == 405
        await works(client, seed)
    assert len(edge.port.edge.connections) == 1


async def test_bytes_one_by_one(client: Client) -> None:
    x = rows(2)
    for byte in infer(x) + METADATA:
        client.send(bytes([byte]))
        await client.writer.drain()
        await asyncio.sleep(0)
    np.testing.assert_allclose((await client.reply()).y(), 2 * x, rtol=1e-5)
    assert (await client.reply()).status == 200


async def test_a_request_split_anywhere(edge: LocalGateway) -> None:
    x = rows(1)
    request = infer(x) + METADATA

    async def split(at: int) -> None:
        async with await edge.connect() as client:
            client.send(request[:at])
            await asyncio.sleep(0.02)
            client.send(request[at:])
            np.testing.assert_allclose((await client.reply()).y(), 2 * x, rtol=1e-5)
            assert (await client.reply()).status == 200

    for start in range(1, len(request), 50):
        await asyncio.gather(*(split(at) for at in range(start, min(start + 50, len(request)))))


async def test_empty_lines_before_a_request(client: Client) -> None:
    for _ in range(2):
        client.send(b"\r\n\r\n")
        await works(client)


@pytest.mark.parametrize("request_", [infer(rows(1), Connection="close"), get("/v2", Connection="close")])
async def test_connection_close(client: Client, request_: bytes) -> None:
    client.send(request_ + METADATA)
    reply = await client.reply()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert await client.ended()


async def test_http_1_0(edge: LocalGateway) -> None:
    for request in (infer(rows(1)), get("/v2")):
        async with await edge.connect() as client:
            assert (await client.ask(request.replace(b"HTTP/1.1", b"HTTP/1.0"))).status == 200
            assert await client.ended()
        async with await edge.connect() as client:
            request = request.replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\nConnection: keep-alive\r\n")
            assert (await client.ask(request)).status == 200
            await works(client)


async def test_chunked_bodies(client: Client) -> None:
    x = rows(9)
    body = infer_json(x)
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 70]), body[i : i + 70]) for i in range(0, len(body), 70))
    request = post(b"", Content_Length=None, Transfer_Encoding="chunked") + chunks + b"0\r\n\r\n"
    for _ in range(3):
        np.testing.assert_allclose((await client.ask(request)).y(), 2 * x, rtol=1e-5)
        await works(client)


async def test_inferences_after_these_never_become_requests_of_aiohttp(edge: LocalGateway) -> None:
    """A body in chunks, one that waited for a word: only they are lent, and what follows is the edge's again."""
    body = infer_json(rows(2))
    chunks = b"%x;x=y\r\n%s\r\n0\r\nDigest: none\r\n\r\n" % (len(body), body)
    chunked = post(b"", Content_Length=None, Transfer_Encoding="chunked") + chunks
    expecting = post(body, Expect="100-continue")
    async with await edge.connect() as client:
        for before in (chunked, expecting):
            client.send(before + infer(rows(1)))
            if before is expecting:
                assert (await client.reply()).status == 100
            for _ in range(2):
                assert (await client.reply()).status == 200
            (connection,) = edge.port.edge.connections.values()
            assert connection.reading is Reading.HEAD
            await works(client)


async def test_expect_continue(client: Client) -> None:
    x = rows(4)
    body = infer_json(x)
    for _ in range(2):
        client.send(post(body, Expect="100-continue")[: -len(body)])
        assert (await client.reply(bodiless=True)).status == 100
        np.testing.assert_allclose((await client.ask(body)).y(), 2 * x, rtol=1e-5)
        await works(client)


async def test_a_refused_expectation_leaves_the_connection_usable_or_closed(edge: LocalGateway) -> None:
    async with await edge.connect() as client:
        reply = await client.ask(post(b"{}", target="/v2/models/cats/infer", Expect="100-continue")[:-2])
        assert reply.status == 404
        # The client has seen the refusal, and sends no body (RFC 9110, section 10.1.1).
        assert await client.ended()
    async with await edge.connect() as client:
        reply = await client.ask(post(b"{}", Expect="a miracle")[:-2])
        assert (reply.status, reply.error) == (417, "Expect 'a miracle' is not served: only 100-continue")
        assert await client.ended()


async def test_head_and_options(client: Client) -> None:
    client.send(get("/v2/health/live", "HEAD"))
    assert (await client.reply(bodiless=True)).status == 200
    await works(client)
    client.send(get("/v2", "HEAD"))
    assert int((await client.reply(bodiless=True)).headers["content-length"]) > 0
    assert (await client.ask(get("/v2/models/echo/infer", "OPTIONS"))).status == 405
    assert (await client.ask(get("*", "OPTIONS"))).status in (400, 404, 405)
    await works(client)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_upgrades_are_ignored(edge: LocalGateway, upgrade: str) -> None:
    """RFC 9110, section 7.8: a server may answer in the protocol that it speaks."""
    for request in (
        get("/v2", Connection="Upgrade", Upgrade=upgrade),
        infer(rows(1), Connection="Upgrade", Upgrade=upgrade),
    ):
        async with await edge.connect() as client:
            reply = await client.ask(request)
            assert (reply.status, reply.headers["connection"]) == (200, "close")
            assert await client.ended()


async def test_the_unread_body_of_a_refused_request_is_no_request(client: Client) -> None:
    """A body that nobody reads, larger than what aiohttp buffers, with a request inside and requests behind it."""
    for size in (10, 300_000):
        body = METADATA + bytes(size)
        client.send(post(body, target="/nowhere") + METADATA)
        assert (await client.reply()).status == 404
        assert (await client.reply()).status == 200
        await works(client)


async def test_a_refusal_before_the_body_has_come(client: Client) -> None:
    request = post(bytes(100_000), target="/nowhere")
    client.send(request[:500])
    assert (await client.reply()).status == 404
    client.send(request[500:])
    for seed in range(3):
        await works(client, seed)
        assert (await client.ask(METADATA)).status == 200


async def test_an_oversized_body(edge: LocalGateway, client: Client) -> None:
    reply = await client.ask(post(b"", Content_Length=(1 << 20) + 1))
    assert reply.status == 413
    assert "over the limit of 1048576 bytes" in reply.error
    assert await client.ended()
    async with await edge.connect() as other:
        await works(other)


async def test_a_body_at_the_limit(client: Client) -> None:
    x = rows(20_000)
    request = infer(x)
    assert 600_000 < len(request) < 1 << 20
    np.testing.assert_allclose((await client.ask(request)).y(), 2 * x, rtol=1e-5)
    await works(client)


async def test_a_truncated_body_then_disconnect(edge: LocalGateway) -> None:
    for length in (70, 400, 90_000):
        client = await edge.connect()
        client.send(infer(rows(20_000))[:length])
        await asyncio.sleep(0.02)
        client.close()
    async with asyncio.timeout(5):
        while edge.port.edge.connections:
            await asyncio.sleep(0.01)
    assert edge.gateway.pipeline.engine.store.used_rows == 0
    async with await edge.connect() as client:
        await works(client)


async def test_a_client_that_closes_its_side_has_left(edge: LocalGateway, client: Client) -> None:
    client.send(infer(rows(1))[:-4])
    client.writer.write_eof()
    assert await client.ended()
    assert edge.gateway.pipeline.engine.store.used_rows == 0


MALFORMED = [
    (b"GARBAGE\r\n\r\n", 400, "this is no HTTP request"),
    (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400, "Invalid header token"),
    (b"GET / HTTP/1.1\nHost: x\n\n", 400, "lines must end with CR LF"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "TLS"),
    (b"POST /v2/models/echo/infer HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "Content-Length"),
    (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "Duplicate Content-Length"),
    (b"POST /v2 HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "Transfer-Encoding"),
    (b"POST /v2 HTTP/1.1\r\nTransfer-Encoding: rot13\r\n\r\n", 400, "Transfer-Encoding"),
    (b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400, "overflow"),
    (b"GET /\r\n\r\n", 505, "HTTP/0.9 is not served"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/2.0 is not served"),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, 431, "over the limit of 65536 bytes"),
    (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431, "over the limit of 65536 bytes"),
]


@pytest.mark.parametrize(("request_", "status", "message"), MALFORMED)
@pytest.mark.parametrize("after", [b"", infer(rows(1)), METADATA])
async def test_malformed_heads_are_v2_errors(
    client: Client, request_: bytes, status: int, message: str, after: bytes
) -> None:
    client.send(after)
    if after:
        assert (await client.reply()).status == 200
    reply = await client.ask(request_)
    assert reply.status == status
    assert message in reply.error
    assert reply.headers["connection"] == "close"
    assert await client.ended()


async def test_a_head_just_below_the_limit(client: Client) -> None:
    for request in (METADATA, infer(rows(1))):
        first, rest = request.split(b"\r\n", 1)
        fat = b"".join(b"x-%d: %s\r\n" % (i, b"a" * 100) for i in range(500))
        assert (await client.ask(first + b"\r\n" + b"X: " + b"b" * 9000 + b"\r\n" + fat + rest)).status == 200
        await works(client)


@pytest.mark.parametrize("chunk", [b"xyz\r\n", b"5\r\nabcdefgh\r\n0\r\n\r\n", b"fffffffffffffffffffff\r\n"])
async def test_broken_chunks_are_v2_errors(client: Client, chunk: bytes) -> None:
    reply = await client.ask(post(b"", Content_Length=None, Transfer_Encoding="chunked") + chunk)
    assert reply.status == 400
    assert reply.error
    assert await client.ended()


async def test_a_malformed_head_behind_a_chunked_request_is_a_v2_error(client: Client) -> None:
    body = infer_json(rows(1))
    client.send(post(b"", Content_Length=None, Transfer_Encoding="chunked"))
    client.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert (await client.reply()).status == 200
    reply = await client.ask(b"GET / HTTP/1.1\r\nno colon\r\n\r\n")
    assert (reply.status, reply.error) == (400, "this is no HTTP request: Invalid header token")
    assert await client.ended()


@pytest.mark.parametrize(
    "before",
    [
        b"",
        post(b"", Content_Length=None, Transfer_Encoding="chunked") + b"0\r\n\r\n",
    ],
    ids=["first", "after a body in chunks"],
)
async def test_another_version_of_http_is_refused_in_ours(client: Client, before: bytes) -> None:
    """Also where aiohttp reads the connection, which would answer in the client's version."""
    if before:
        assert (await client.ask(before)).status == 400
    reply = await client.ask(get("/v2").replace(b"HTTP/1.1", b"HTTP/0.9"))
    assert reply.status == 505
    assert "HTTP/0.9 is not served" in reply.error
    assert await client.ended()
