"""Clients that ask one after the other until they are told to stop, and check every answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np

from tests.support.data_plane import LocalGateway
from tests.support.http_client import Array, infer, rows

MOST_ROWS = 12


class SteadyLoad:
    """What the clients have seen: right answers, and what was wrong with the others."""

    def __init__(self) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self.stopped = False

    async def answered(self, more: int, within_s: float = 30.0) -> None:
        """Wait until so many more are answered."""
        goal = self.right + more
        async with asyncio.timeout(within_s):
            while self.right < goal and not self.wrong:
                await asyncio.sleep(0.01)
        assert self.wrong == []

    async def ask_on(self, local: LocalGateway, seed: int, expected: Callable[[Array], Array]) -> None:
        """One client's life."""
        x = rows(MOST_ROWS, seed)
        async with await local.connect() as client:
            count = 0
            while not self.stopped:
                count = count % MOST_ROWS + 1
                reply = await client.ask(infer(x[:count]))
                if reply.status != 200:
                    self.wrong.append(f"{reply.status}: {reply.body[:300]!r}")
                    return
                if not np.allclose(reply.y(), expected(x[:count]), rtol=1e-5):
                    self.wrong.append(f"{reply.y()} for {expected(x[:count])}")
                    return
                self.right += 1


@contextlib.asynccontextmanager
async def steady_load(
    local: LocalGateway, expected: Callable[[Array], Array], clients: int = 8
) -> AsyncIterator[SteadyLoad]:
    """So many clients ask while the body runs; at its end not one answer may have been wrong."""
    load = SteadyLoad()
    asking = [asyncio.create_task(load.ask_on(local, seed, expected)) for seed in range(clients)]
    try:
        yield load
    finally:
        load.stopped = True
        await asyncio.wait(asking, timeout=30)
    for one in asking:
        one.result()
    assert load.wrong == []
