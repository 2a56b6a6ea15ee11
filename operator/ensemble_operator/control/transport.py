"""Requests to the API server over one pool of connections: time limits, retries, counts. Knows nothing of objects."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import msgspec

from ensemble_operator.control.errors import ClusterError, Unauthorized, Unavailable
from ensemble_operator.control.responses import Call, error_of, may_pass

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

CONNECT_TIMEOUT_S = 5.0
# The server sends a bookmark a minute, give or take a quarter, but none of a kind of which nothing has ever happened:
# silence for longer may be a dead connection.
WATCH_SILENCE_S = 100.0
DEFAULT_RETRY_DELAYS_S = (0.2, 0.6, 1.5)
MAX_RETRY_AFTER_S = 10.0
_NO_ANSWER = 0
_BROKEN = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


@dataclass(frozen=True, slots=True)
class Retries:
    """After which delays a request is sent again, and for how long in all."""

    delays_s: tuple[float, ...] = DEFAULT_RETRY_DELAYS_S
    budget_s: float = 15.0


class Credentials(Protocol):
    """Says who we are."""

    async def headers(self) -> Mapping[str, str]:
        """What every request carries."""
        ...

    async def renew(self) -> None:
        """Forget what was refused, and read or ask for new ones."""
        ...


class Transport:
    """Sends calls and counts them: `counts[verb, resource, code]`, code 0 where there was no answer."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        server: str,
        credentials: Credentials,
        options: Mapping[str, Any],
    ) -> None:
        self.counts: Counter[tuple[str, str, int]] = Counter()
        self._session = session
        self._server = server.rstrip("/")
        self._credentials = credentials
        self._options = dict(options)

    async def send(
        self,
        call: Call,
        method: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
        timeout_s: float = 10.0,
        retries: Retries | None = None,
    ) -> dict[str, Any]:
        """The decoded answer.

        Raises a ClusterError: what may pass is tried again first, no sooner than the server asks for.
        """
        retries = retries or Retries()
        payload = None if body is None else msgspec.json.encode(body)
        loop = asyncio.get_running_loop()
        give_up = loop.time() + retries.budget_s
        for delay_s in (*retries.delays_s, None):
            try:
                return await self._once(call, method, query, payload, content_type, accept, timeout_s)
            except Unauthorized:
                if delay_s is None:
                    raise
                await self._credentials.renew()
                await asyncio.sleep(delay_s)
            except Unavailable as error:
                if delay_s is None:
                    raise
                pause_s = max(delay_s * random.uniform(0.75, 1.25), min(error.retry_after_s or 0, MAX_RETRY_AFTER_S))  # noqa: S311
                if loop.time() + pause_s > give_up:
                    raise
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def stream(
        self, call: Call, query: Mapping[str, str], silence_s: float = WATCH_SILENCE_S
    ) -> AsyncIterator[bytes]:
        """The lines of a watch until the server ends it, or is silent for too long; before them an empty one.

        That is when it is accepted. Raises a ClusterError when it is refused, cannot be reached, or breaks.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=silence_s)
        rest = bytearray()
        accepted = False
        try:
            async with self._request(call, "GET", query, None, {"Accept": JSON}, timeout) as answer:
                if answer.status >= 400:
                    raise error_of(call, answer.status, await answer.read(), _retry_after_s(answer))
                accepted = True
                yield b""
                async for chunk in answer.content.iter_any():
                    rest += chunk
                    if b"\n" not in chunk:
                        continue
                    *lines, last = bytes(rest).split(b"\n")
                    rest = bytearray(last)
                    for line in lines:
                        yield line
        except _BROKEN as error:
            # Whoever asks again from where it ended misses nothing, and learns whether the server is there.
            if accepted and isinstance(error, aiohttp.SocketTimeoutError):
                return
            raise Unavailable(f"{call}: {_why(error)}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _once(
        self,
        call: Call,
        method: str,
        query: Mapping[str, str] | None,
        payload: bytes | None,
        content_type: str,
        accept: str,
        timeout_s: float,
    ) -> dict[str, Any]:
        headers = {"Accept": accept, "Content-Type": content_type}
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            async with self._request(call, method, query, payload, headers, timeout) as answer:
                text = await answer.read()
        except _BROKEN as error:
            raise Unavailable(f"{call}: {_why(error)}") from error
        if answer.status < 400:
            try:
                decoded = msgspec.json.decode(text)
            except msgspec.DecodeError as error:
                raise Unavailable(f"{call}: an answer that is no JSON, from a proxy? {error}") from error
            return decoded if isinstance(decoded, dict) else {}
        failure = error_of(call, answer.status, text, _retry_after_s(answer))
        if isinstance(failure, Unavailable) and not may_pass(answer.status):
            raise ClusterError(str(failure))
        raise failure

    @contextlib.asynccontextmanager
    async def _request(
        self,
        call: Call,
        method: str,
        query: Mapping[str, str] | None,
        payload: bytes | None,
        headers: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request, authorized when it starts and counted when it is answered or is not."""
        url = self._server + call.kind.path(call.namespace, call.name, call.subresource)
        headers = {**headers, **await self._credentials.headers()}
        code = _NO_ANSWER
        try:
            answer = await self._session.request(
                method, url, params=query, data=payload, headers=headers, timeout=limits, **self._options
            )
            code = answer.status
        finally:
            self.counts[call.verb, call.resource, code] += 1
        async with answer:
            yield answer


def _retry_after_s(answer: aiohttp.ClientResponse) -> float | None:
    try:
        return max(0.0, float(answer.headers.get("Retry-After", "")))
    except ValueError:
        return None


def _why(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return f"{error}" or type(error).__name__
