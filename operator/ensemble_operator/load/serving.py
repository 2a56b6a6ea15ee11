"""What serving costs on this machine's CPU devices: measured with gateway, workers and clients, once, and kept."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.bar import Bar
from ensemble_operator.load.live import Score, Trials
from ensemble_operator.load.stage import stage_options, staged
from ensemble_operator.profiles.held import serving_problem
from ensemble_operator.profiles.measurements import agreed_tensors
from ensemble_operator.profiles.profiling import Profiled
from ensemble_operator.profiles.serving_cost import (
    KeptCosts,
    ServingCost,
    cost_key,
    cost_of,
    layouts_to_measure,
)
from ensemble_operator.serve.preparation import prepare

WINDOW_S, WINDOWS = 1.5, 3
# To start the processes, and of a window to place its layout and to warm up.
START_S, PLACE_S = 5.0, 1.5


class _Quiet:
    """Of the preparation nothing is said: it was said while the members were measured."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


async def serving_cost(
    file: Path,
    profiled: Profiled,
    cpu_devices: int | None,
    cache_folder: Path,
    runtime_base: str | None,
    *,
    force: bool,
) -> ServingCost | None:
    """The cost for an ensemble that was profiled; None where nothing can be told: GPUs, too little memory or time.

    What does not come to answer is said, and not kept. With `force` what is known is measured again. Raises what
    `ensemble serve` does.
    """
    ensemble, devices, measured = profiled.ensemble, profiled.devices, profiled.measured
    able = {name: found.signature for (name, _), found in measured.items() if found.points}
    if len(able) < len(ensemble.spec.members) or any(device.kind != "cpu" for device in devices):
        return None
    tensors = agreed_tensors(ensemble, able)
    kept, key = KeptCosts(cache_folder), cost_key(tensors, len(able), devices)
    known = None if force else kept.read(key)
    if known is not None:
        return known
    try:
        problem = serving_problem(ensemble, devices, measured)
    except InvalidProblem:
        return None
    layouts = layouts_to_measure(problem)
    if not layouts:
        return None
    with Bar(WINDOWS * len(layouts), "measuring what serving costs") as bar:
        if profiled.left_s < START_S + WINDOWS * len(layouts) * (WINDOW_S + PLACE_S):
            bar.note("what serving costs is not measured: no time is left for it; raise --budget or profileBudget")
            return None
        planned = await prepare(stage_options(file, cpu_devices, cache_folder, runtime_base), _Quiet())
        async with staged(planned, cache_folder, runtime_base, lambda name, line: bar.note(f"{name}: {line}")) as stage:
            trials = Trials(stage, problem, bar.at, WINDOW_S)
            windows, failure = await windows_of(trials.measure, layouts)
        if failure:
            bar.note(f"what serving costs is not measured: {failure}")
            return None
    cost = cost_of(problem, windows)
    try:
        kept.write(key, cost)
    except OSError as error:
        raise OSError(f"{cache_folder}: {error.strerror}") from error
    return cost


async def windows_of(
    measure: Callable[[Matrix], Awaitable[Score]], layouts: Sequence[Matrix]
) -> tuple[dict[Matrix, list[float]], str]:
    """The rows/s of each layout in every window, the layouts in turn; and why one of them did not answer."""
    windows: dict[Matrix, list[float]] = {matrix: [] for matrix in layouts}
    for _ in range(WINDOWS):
        for matrix in layouts:
            score = await measure(matrix)
            if score.failure or not score.rows_per_s > 0:
                return windows, score.failure or "nothing was answered"
            windows[matrix].append(score.rows_per_s)
    return windows, ""
