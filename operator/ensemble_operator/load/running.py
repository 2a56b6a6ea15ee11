"""Runs a load in a process of its own, and passes on what it tells."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import msgspec

from ensemble_operator.exits import describe
from ensemble_operator.load.loads import Line, Load, Progress, Result
from ensemble_operator.load.target import TargetUnusable
from ensemble_operator.processes import run_once

GENERATOR = (sys.executable, "-m", "ensemble_operator.load.loadgen")


async def run(load: Load, told: Callable[[Progress], None]) -> Result:
    """What came of a load; `refused` in it says why none was possible.

    Raises TargetUnusable if the load generator itself fails.
    """
    found: list[Result] = []

    def read(text: str) -> None:
        line = msgspec.json.decode(text, type=Line)
        if line.result is not None:
            found.append(line.result)
        if line.progress is not None:
            told(line.progress)

    answer = await run_once((*GENERATOR, str(os.getpid())), read, stdin=msgspec.json.encode(load))
    if not found:
        words = answer.errors[-1] if answer.errors else "no last words"
        raise TargetUnusable(f"the load generator {describe(answer.code)}: {words}")
    return found[0]
