"""Hostile bytes at the public port: it stays up, keeps nothing, logs no exception, and the next request works."""

import asyncio
import gzip
import logging
import random
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemble_gateway.admission import Limits
from ensemble_gateway.heads import Heads
from tests.support.data_plane import LocalGateway, Workers, serving
from tests.support.http_client import get, infer, infer_json, post, rows
from tests.support.plane_members import TIMES

SECONDS = 6.0
ROUND = 16
SEEDS = [
    infer(rows(3)),
    infer(rows(1)) + get("/v2") + infer(rows(2)),
    get("/v2/models/echo/config"),
    post(infer_json(rows(2)), Content_Type="application/json"),
    post(gzip.compress(infer_json(rows(2))), Content_Encoding="gzip"),
    post(b"", Content_Length=None, Transfer_Encoding="chunked") + b'5\r\n{"inp\r\n3;a=b\r\nuts\r\n0\r\nT: x\r\n\r\n',
    post(b"{}", Expect="100-continue"),
    post(b"{}", target="/v2/repository/index"),
    get("/v2", Connection="Upgrade", Upgrade="websocket"),
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"\r\n\r\n", b"\xff", b"%00", b"%2f", b"/../", b"HTTP/1.0", b"HTTP/2.0",
    b"Content-Length: 0\r\n", b"Content-Length: 18446744073709551615\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Inference-Header-Content-Length: 99999999999999999999\r\n", b"Inference-Header-Content-Length: -1\r\n",
    b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"0\r\n\r\n",
    b"fffffffff\r\n", b"Content-Encoding: deflate\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n", b"PUT", b"HEAD", b"OPTIONS",
]  # fmt: skip


def mutated(chance: random.Random) -> bytes:
    text = bytearray(b"".join(chance.choices(SEEDS, k=chance.randint(1, 3))))
    for _ in range(chance.randint(1, 5)):
        # Heads are where most is decided.
        start = chance.randrange(min(len(text), chance.choice((40, 200, 1000))) + 1)
        stop = min(len(text), start + chance.choice((0, 0, 1, 2, 8, 50)))
        piece = chance.choice((b"", chance.randbytes(1), chance.choice(TOKENS), chance.choice(TOKENS)))
        text[start:stop] = piece
    return bytes(text)


async def attack(local: LocalGateway, chance: random.Random) -> None:
    """One hostile connection: sends in pieces, reads a little or nothing, leaves."""
    reader, writer = await asyncio.open_connection("127.0.0.1", local.number)
    text = mutated(chance)
    try:
        at = 0
        while at < len(text):
            size = chance.choice((1, 7, 100, len(text)))
            writer.write(text[at : at + size])
            at += size
            if chance.random() < 0.2:
                await asyncio.sleep(0)
        if chance.random() < 0.8:
            answer = await asyncio.wait_for(reader.read(1 << 16), 0.02)
            assert not answer or re.match(rb"HTTP/1\.[01] [1-5]\d\d ", answer), answer[:100]
    except (TimeoutError, ConnectionError):
        pass
    finally:
        if chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


@pytest.mark.slow
async def test_random_mutations(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    chance = random.Random(20)
    limits = Limits(stall_s=0.5, idle_s=1.0, linger_s=0.1)
    deadline = time.monotonic() + SECONDS
    attacks = 0
    with caplog.at_level(logging.ERROR):
        async with serving(workers.plan(*TIMES, timeout_s=2.0), limits) as local:
            while time.monotonic() < deadline:
                await asyncio.gather(*(attack(local, chance) for _ in range(ROUND)))
                attacks += ROUND
                async with await local.connect() as client:
                    x = rows(2, attacks)
                    np.testing.assert_allclose((await client.ask(infer(x), 5)).y(), 2 * x, rtol=1e-5)
                    assert (await client.ask(get("/v2/health/live"), 5)).status == 200
            async with asyncio.timeout(5):
                while local.port.edge.connections or local.gateway.pipeline.engine.store.used_rows:
                    await asyncio.sleep(0.01)
    assert not problems
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text
    assert attacks > 100


NAMES = (
    "Content-Length Transfer-Encoding Expect Connection Upgrade Content-Type Accept-Encoding Content-Encoding "
    "Inference-Header-Content-Length Host X"
)
VALUES = ["0", "7", "-1", "chunked", "100-continue", "close", "upgrade", "gzip", "application/json", "", "é"]
HEADER = st.tuples(st.sampled_from(NAMES.split()), st.sampled_from(VALUES) | st.text(max_size=6))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "CONNECT", "OPTIONS", "get", ""]),
    target=st.sampled_from(["/v2/models/m/infer", "/v2/models/m/versions/1/infer", "*", "/", "http://h/v2", ""])
    | st.text(max_size=12),
    version=st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "", "HTTP/1.1 "]),
    headers=st.lists(HEADER, max_size=6),
)
def test_any_head_is_understood_or_refused(
    method: str, target: str, version: str, headers: list[tuple[str, str]]
) -> None:
    """Whatever comes, a head is exactly one of: an inference, aiohttp's with a known end, aiohttp's, refused."""
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in headers)]
    text = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
    head = Heads(1000).parse(text)
    assert head.length == len(text)
    assert head.size >= head.length
    assert [head.fast, head.endless, head.refusal is not None].count(True) <= 1
    if head.fast:
        assert method == "POST"
        assert head.size - head.length <= 1000
    if head.refusal is not None:
        assert head.refusal[0] in (400, 417, 505)
    assert Heads(1000).parse(text) == head
