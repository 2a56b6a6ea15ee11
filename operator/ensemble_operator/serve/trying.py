"""`evaluate: live` in `ensemble serve`: the candidates of the search run on this machine, before the first answer."""

from __future__ import annotations

from dataclasses import replace

from ensemble_operator.load.live import Trials, plan_live
from ensemble_operator.load.stage import staged
from ensemble_operator.planning.settings import options_of
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.preparation import Planned, ServeOptions


async def tried(planned: Planned, options: ServeOptions, screen: Screen) -> Planned:
    """The same with the matrix that was measured fastest.

    Raises what the processes of a deployment do when they cannot go on.
    """
    measured = 0

    def told(candidates: int, text: str) -> None:
        nonlocal measured
        # Else it says how the one under way comes along.
        if candidates > measured:
            measured = candidates
            screen.note(text)

    wanted = options_of(planned.ensemble.spec.planning, copies=len(planned.devices))
    async with staged(planned, options.cache_folder, options.runtime_base, screen.wrote) as stage:
        found = await plan_live(planned.problem, wanted, Trials(stage, planned.problem, told))
    screen.note(f"the fastest of {measured} candidates is taken: {found.measured_rows_per_s or 0:,.0f} rows/s")
    return replace(planned, matrix=found.matrix, predicted_rows_per_s=found.predicted_rows_per_s)
