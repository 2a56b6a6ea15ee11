"""Plans in a child process: started for the first question, kept warm for the next, ended when idle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import msgspec

from ensemble_operator.control.questions import PlanAnswer, PlanQuestion
from ensemble_operator.errors import EnsembleError
from ensemble_operator.processes import Conversation

IDLE_S = 30.0
# The search limits itself to seconds; a thousand devices take some.
DEADLINE_S = 120.0
_PROGRAM = (sys.executable, "-m", "ensemble_operator.control.planning_child")


class PlannerFailed(EnsembleError):
    """The planning process ended or did not answer in time; the message has its last words."""


class Planner:
    """Answers questions one at a time. `close` it at the end."""

    def __init__(self, idle_s: float = IDLE_S, deadline_s: float = DEADLINE_S) -> None:
        self._idle_s, self._deadline_s = idle_s, deadline_s
        self._child: Conversation | None = None
        self._turn = asyncio.Lock()
        self._ending: asyncio.TimerHandle | None = None
        self._ended: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._child.pid if self._child is not None else None

    async def plan(self, question: PlanQuestion) -> PlanAnswer:
        """The answer to a question.

        Raises PlannerFailed.
        """
        line = msgspec.json.encode(question)
        async with self._turn:
            self._stay()
            try:
                return msgspec.json.decode(await self._ask(line), type=PlanAnswer)
            except msgspec.DecodeError as error:
                await self._end()
                raise PlannerFailed(f"the planning process answered something else: {error}") from error
            finally:
                loop = asyncio.get_running_loop()
                self._ending = loop.call_later(self._idle_s, self._end_soon)

    async def close(self) -> None:
        """End the child."""
        self._stay()
        await self._end()
        if self._ended:
            await asyncio.wait(self._ended)

    async def _ask(self, line: bytes) -> bytes:
        if self._child is None:
            try:
                self._child = await Conversation.start((*_PROGRAM, str(os.getpid())))
            except OSError as error:
                raise PlannerFailed(f"the planning process cannot be started: {error}") from error
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._child.ask(line)
        except TimeoutError:
            await self._end()
            raise PlannerFailed(f"no plan was found within {self._deadline_s:g} s") from None
        except ConnectionError:
            words = self._child.last_words
            await self._end()
            raise PlannerFailed(f"the planning process ended: {words}") from None
        except asyncio.CancelledError:
            await self._end()
            raise

    def _stay(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None

    def _end_soon(self) -> None:
        # Taken here and now: the next question gets a child of its own.
        child, self._child = self._child, None
        task = asyncio.get_running_loop().create_task(_end(child))
        self._ended.add(task)
        task.add_done_callback(self._ended.discard)

    async def _end(self) -> None:
        child, self._child = self._child, None
        await _end(child)


async def _end(child: Conversation | None) -> None:
    if child is not None:
        with contextlib.suppress(OSError):
            await child.end()
