"""What serving costs on this machine's CPU devices: measured with gateway, workers and clients, once, and kept."""

from __future__ import annotations

from pathlib import Path

from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.bar import Bar
from ensemble_operator.load.live import Trials
from ensemble_operator.load.stage import stage_options, staged
from ensemble_operator.profiles.held import serving_problem
from ensemble_operator.profiles.measurements import agreed_tensors
from ensemble_operator.profiles.profiling import Profiled
from ensemble_operator.profiles.serving_cost import (
    KeptCosts,
    Observation,
    ServingCost,
    cost_key,
    fitted,
    layouts_to_measure,
)
from ensemble_operator.serve.preparation import prepare

WINDOW_S = 1.5


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
    """The cost for an ensemble that was profiled; None where nothing is to be measured: GPUs, or too little memory.

    With `force` what is known is measured again. Raises what `ensemble serve` does.
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
    planned = await prepare(stage_options(file, cpu_devices, cache_folder, runtime_base), _Quiet())
    with Bar(len(layouts), "measuring what serving costs") as bar:
        async with staged(planned, cache_folder, runtime_base, lambda name, line: bar.note(f"{name}: {line}")) as stage:
            trials = Trials(stage, problem, bar.at, WINDOW_S)
            seen = [Observation(matrix, (await trials.measure(matrix)).rows_per_s) for matrix in layouts]
    cost = fitted(problem, seen)
    try:
        kept.write(key, cost)
    except OSError as error:
        raise OSError(f"{cache_folder}: {error.strerror}") from error
    return cost
