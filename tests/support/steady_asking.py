"""Requests to an ensemble of a cluster, one after the other while something else goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import aiohttp

from tests.support.operating import Operating

PAUSE_S = 0.05


class Answers:
    """How many requests were answered, and what became of the others."""

    def __init__(self) -> None:
        self.count, self.failed = 0, list[str]()


@contextlib.asynccontextmanager
async def asking(world: Operating, name: str, row: Sequence[float]) -> AsyncIterator[Answers]:
    """Ask all the time."""
    answers = Answers()

    async def run() -> None:
        while True:
            try:
                answer = await world.ask(name, [row])
            except (aiohttp.ClientError, TimeoutError) as error:
                answers.failed.append(repr(error))
            else:
                answers.count += 1
                if "outputs" not in answer:
                    answers.failed.append(str(answer))
            await asyncio.sleep(PAUSE_S)

    task = asyncio.create_task(run())
    try:
        yield answers
    finally:
        task.cancel()
        await asyncio.wait([task])
        with contextlib.suppress(asyncio.CancelledError):
            task.result()
