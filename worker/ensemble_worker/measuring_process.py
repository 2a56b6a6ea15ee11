"""A measuring process of a worker: given its question, followed line by line, ended when nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence

import msgspec

MAX_LINE_BYTES = 1 << 20
KEPT_ERROR_BYTES = 4096
# A process that says nothing for so long hangs: the largest models load in less.
SILENCE_S = 1800.0


async def conduct(command: Sequence[str], question: object, take: Callable[[bytes], None]) -> str:
    """Run a process, give it its question as JSON, and `take` every line it prints; in words how it failed, or "".

    Cancelled, it ends the process and all that this has started. Raises OSError if it cannot be started, ValueError for
    a line that is too long, and what `take` raises.
    """
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True, limit=MAX_LINE_BYTES,
    )  # fmt: skip
    try:
        return await _follow(child, msgspec.json.encode(question), take)
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()


async def _follow(child: asyncio.subprocess.Process, question: bytes, take: Callable[[bytes], None]) -> str:
    if child.stdin is None or child.stdout is None or child.stderr is None:
        raise AssertionError("all three were asked for")
    words = asyncio.create_task(_last_words(child.stderr))
    try:
        with contextlib.suppress(ConnectionError):  # it may end without reading
            child.stdin.write(question)
            await asyncio.wait_for(child.stdin.drain(), SILENCE_S)
        child.stdin.close()
        while text := await asyncio.wait_for(child.stdout.readline(), SILENCE_S):
            take(text)
        code = await asyncio.wait_for(child.wait(), SILENCE_S)
        if code == 0:
            return ""
        said = await asyncio.wait_for(words, SILENCE_S)
        return f"{_ended(code)}{said and f': {said}'}"
    except TimeoutError:
        return f"said nothing for {SILENCE_S:.0f} s"
    finally:
        words.cancel()


async def _last_words(stream: asyncio.StreamReader) -> str:
    """The last line of what a child wrote to its standard error."""
    kept = b""
    while chunk := await stream.read(KEPT_ERROR_BYTES):
        kept = (kept + chunk)[-KEPT_ERROR_BYTES:]
    lines = [line for line in kept.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code == -signal.SIGKILL:
        return "was killed, which the kernel does when memory runs out"
    return f"ended with signal {-code}" if code < 0 else f"ended with code {code}"
