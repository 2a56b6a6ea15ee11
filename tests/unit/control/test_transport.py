"""Requests against a server that misbehaves as API servers and proxies do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from ensemble_operator.control.errors import Invalid, NotFound, Unauthorized, Unavailable
from ensemble_operator.control.kinds import POD
from ensemble_operator.control.responses import Call
from ensemble_operator.control.transport import Retries, Transport

CALL = Call("get", POD, "ns", "p")
QUICK = Retries(delays_s=(0.01, 0.01))

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Token:
    """Who we are: refused until renewed."""

    def __init__(self) -> None:
        self.value = "old"

    async def headers(self) -> Mapping[str, str]:
        return {"authorization": f"Bearer {self.value}"}

    async def renew(self) -> None:
        self.value = "new"


@asynccontextmanager
async def transport_to(*answers: Answer) -> AsyncIterator[Transport]:
    """A transport to a server that gives one answer after the other, the last one for ever."""
    left = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    session = aiohttp.ClientSession()
    transport = Transport(session, f"http://127.0.0.1:{runner.addresses[0][1]}/", Token(), {})
    try:
        async with asyncio.timeout(20):
            yield transport
    finally:
        await transport.close()
        await runner.cleanup()


def says(status: int, text: str = "{}", **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text=text, headers=named)

    return answer


async def hangs_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hangs(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


@pytest.mark.parametrize("trouble", [says(429), says(500), says(503), says(502, "<html>"), hangs_up])
async def test_what_may_pass_is_tried_again(trouble: Answer) -> None:
    async with transport_to(trouble, trouble, says(200, '{"a": 1}')) as transport:
        assert await transport.send(CALL, "GET", retries=QUICK) == {"a": 1}
        # One that hangs up is asked once more by aiohttp itself, uncounted.
        assert transport.counts.total() == (2 if trouble is hangs_up else 3)
        assert transport.counts["get", "pods", 200] == 1


async def test_what_does_not_pass_is_told_after_the_last_attempt() -> None:
    async with transport_to(says(503, '{"message": "starting"}')) as transport:
        with pytest.raises(Unavailable, match="starting"):
            await transport.send(CALL, "GET", retries=QUICK)
        assert transport.counts["get", "pods", 503] == 3


@pytest.mark.parametrize(("status", "error"), [(404, NotFound), (400, Invalid)])
async def test_what_will_not_pass_is_not_tried_again(status: int, error: type[Exception]) -> None:
    async with transport_to(says(status)) as transport:
        with pytest.raises(error):
            await transport.send(CALL, "GET", retries=QUICK)
        assert transport.counts.total() == 1


async def test_the_server_says_how_long_to_wait() -> None:
    async with transport_to(says(429, Retry_After="1"), says(200)) as transport:
        began = time.monotonic()
        await transport.send(CALL, "GET", retries=QUICK)
        assert time.monotonic() - began >= 1


async def test_longer_than_the_budget_is_not_waited() -> None:
    async with transport_to(says(429, Retry_After="9")) as transport:
        with pytest.raises(Unavailable):
            await transport.send(CALL, "GET", retries=Retries(delays_s=(0.01,), budget_s=1))
        assert transport.counts.total() == 1


async def test_no_answer_in_time_counts_as_none() -> None:
    async with transport_to(hangs) as transport:
        with pytest.raises(Unavailable, match="no answer in time"):
            await transport.send(CALL, "GET", timeout_s=0.1, retries=QUICK)
        assert transport.counts["get", "pods", 0] == 3


async def test_a_token_that_is_refused_is_renewed() -> None:
    async def strict(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.headers["Authorization"] == "Bearer new" else 401, text="{}")

    async with transport_to(strict) as transport:
        await transport.send(CALL, "GET", retries=QUICK)
    async with transport_to(says(401)) as transport:
        with pytest.raises(Unauthorized):
            await transport.send(CALL, "GET", retries=QUICK)


async def test_an_answer_that_is_no_json_is_trouble() -> None:
    async with transport_to(says(200, "<html>log in</html>")) as transport:
        with pytest.raises(Unavailable, match="no JSON"):
            await transport.send(CALL, "GET", retries=QUICK)


async def test_lines_of_a_stream_whatever_the_pieces() -> None:
    long = b"x" * 3_000_000

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for piece in (b"a\nb", b"c", b"\n", long, b"\nlast\n"):
            await answer.write(piece)
            await asyncio.sleep(0.01)
        return answer

    async with transport_to(stream) as transport:
        lines = [line async for line in transport.stream(CALL, {})]
    assert lines == [b"", b"a", b"bc", long, b"last"]


async def test_a_stream_that_breaks_is_trouble() -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"a\n")
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return answer

    async with transport_to(stream) as transport:
        lines = transport.stream(CALL, {})
        assert [await anext(lines), await anext(lines)] == [b"", b"a"]
        with pytest.raises(Unavailable):
            await anext(lines)


async def test_a_stream_that_is_silent_for_long_ends() -> None:
    """An API server says nothing of a kind of which nothing has happened; one that is away does not accept."""

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"a\n")
        await asyncio.sleep(30)
        return answer

    async with transport_to(stream) as transport, asyncio.timeout(10):
        assert [line async for line in transport.stream(CALL, {}, silence_s=0.2)] == [b"", b"a"]
    async with transport_to(hangs) as transport, asyncio.timeout(10):
        with pytest.raises(Unavailable, match="no answer in time"):
            await anext(transport.stream(CALL, {}, silence_s=0.2))


async def test_a_stream_that_is_refused_is_told() -> None:
    async with transport_to(says(410, '{"message": "too old", "reason": "Expired"}')) as transport:
        with pytest.raises(Exception, match="too old"):
            async for _ in transport.stream(CALL, {}):
                pass


async def test_nobody_listens() -> None:
    async with transport_to(says(200)) as transport:
        transport._server = "http://127.0.0.1:1"
        with pytest.raises(Unavailable):
            await transport.send(CALL, "GET", retries=QUICK)
