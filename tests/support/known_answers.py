"""Clients that ask an ensemble without a pause, and know every answer that it may give: one of several combinations."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import numpy as np

from tests.support.http_client import Array, Client, infer, rows

CLIENTS = 8
PATIENCE_S = 180.0
SIZES = (1, 2, 5, 1, 3, 8, 1, 4)
REQUESTS = [rows(size, seed) for seed, size in enumerate(SIZES)]


class KnownAnswers:
    """What was asked and answered: `answers` counts by combination; `wrong` and `failed` have the others."""

    def __init__(self, url: str, model: str, combinations: Mapping[str, Sequence[Array]]) -> None:
        """`combinations` has, by name, the answer to each of REQUESTS."""
        parts = urlsplit(url)
        self._host, self._port, self._model = parts.hostname, parts.port, model
        self.combinations = dict(combinations)
        self.answers = Counter[str]()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self._stop = False

    @property
    def total(self) -> int:
        """Requests that were answered or refused."""
        return self.answers.total() + len(self.wrong) + len(self.failed)

    async def more(self, count: int) -> None:
        """Wait until so many more requests are over."""
        wanted = self.total + count
        async with asyncio.timeout(PATIENCE_S):
            while self.total < wanted:
                await asyncio.sleep(0.01)

    async def only(self, name: str, count: int = 200) -> None:
        """Wait for so many answers; each must be of this combination, for those asked for from now on."""
        await self.more(CLIENTS)  # what was under way
        before = self.answers[name], self.total
        await self.more(count)
        assert self.answers[name] - before[0] == self.total - before[1], (self.answers, self.failed[:3], self.wrong[:3])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask while the block runs."""
        self._stop = False
        tasks = [asyncio.create_task(self._ask_on(client)) for client in range(CLIENTS)]
        try:
            yield
        finally:
            self._stop = True
            await asyncio.gather(*tasks)

    async def _ask_on(self, number: int) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        async with Client(reader, writer) as client:
            while not self._stop:
                which = (number := number + 1) % len(REQUESTS)
                reply = await client.ask(infer(REQUESTS[which], model=self._model))
                if reply.status != 200:
                    self.failed.append(f"{reply.status}: {reply.body[:300]!r}")
                    continue
                output = reply.y("y")
                fits = [name for name, ys in self.combinations.items() if np.allclose(output, ys[which], 1e-4, 1e-6)]
                if len(fits) == 1:
                    self.answers[fits[0]] += 1
                else:
                    self.wrong.append(f"{fits} {output}")
