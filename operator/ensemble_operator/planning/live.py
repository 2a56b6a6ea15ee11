"""`ensemble plan` with `evaluate: live`: the candidates of the search run on this machine, and the fastest is taken."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import Plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.bar import Bar
from ensemble_operator.load.live import LEAST_WINDOW_S, Trials, plan_live
from ensemble_operator.load.stage import staged
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.preparation import ServeOptions, prepare


async def plan_here(
    serving: ServeOptions, problem: Problem, options: PlanOptions, screen: Screen, window_s: float | None
) -> Plan:
    """The plan of an ensemble whose candidates were measured on this machine's devices.

    `window_s` is the least time that answers of a candidate are counted. Ctrl-C ends the search with the best so far;
    once more, or SIGTERM, gives up. Raises what `ensemble serve` does.
    """
    planned = await prepare(serving, screen)
    async with staged(planned, serving.cache_folder, serving.runtime_base, screen.wrote) as stage:
        with Bar(candidates_of(options), "starting the workers") as bar:
            trials = Trials(stage, problem, bar.at, window_s or LEAST_WINDOW_S)
            with _stopped_by_ctrl_c(trials, bar):
                return await plan_live(problem, options, trials)


def candidates_of(options: PlanOptions) -> int:
    """The most candidates that a search measures."""
    if options.strategy == "greedy-paper":
        return 1 + options.max_iterations * options.max_neighbours
    return max(1, options.max_iterations)


@contextmanager
def _stopped_by_ctrl_c(trials: Trials, bar: Bar) -> Iterator[None]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    asked = False

    def interrupted() -> None:
        nonlocal asked
        if asked:
            ended()
            return
        asked = True
        bar.note("stopping with the best so far; Ctrl-C once more gives up")
        trials.stop()

    def ended() -> None:
        if task is not None:
            task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, ended)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
