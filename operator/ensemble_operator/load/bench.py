"""`ensemble bench`: a load on a running server, or on an ensemble served on this machine for as long as it takes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.bar import Bar
from ensemble_operator.load.loads import Load, Progress, Result
from ensemble_operator.load.running import run
from ensemble_operator.load.target import Target, TargetUnusable, find_target
from ensemble_operator.serve import local
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.preparation import ServeOptions, prepare
from ensemble_operator.serve.runtime_folder import runtime_folder


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan promises, and how many rows one batch of every instance takes: fewer under way cannot reach it."""

    rows_per_s: float
    batch_rows: int


@dataclass(frozen=True, slots=True)
class Bench:
    """What was asked for and what came of it, and what the plan says of it, where there is one."""

    target: Target
    load: Load
    result: Result
    prediction: Prediction | None


async def bench_url(url: str, model: str | None, load_on: Callable[[Target], Load]) -> Bench:
    """Put a load on a running server.

    Raises TargetUnusable.
    """
    target = await find_target(url, model)
    load = load_on(target)
    return Bench(target, load, await put(load), None)


async def bench_file(options: ServeOptions, model: str | None, load_on: Callable[[Target], Load]) -> Bench:
    """Serve an ensemble as `ensemble serve` does, put a load on it, and end it.

    Raises TargetUnusable, and what `ensemble serve` does.
    """
    async with _served(options, Screen()) as (url, prediction):
        found = await bench_url(url, model, load_on)
    # Of a member alone the plan says nothing.
    return Bench(found.target, found.load, found.result, None if model else prediction)


async def put(load: Load) -> Result:
    """Put a load on a server from a process of its own, with a progress bar.

    Raises TargetUnusable if no load is possible.
    """
    with Bar(load.warmup_s + load.duration_s, "starting the load") as bar:

        def told(progress: Progress) -> None:
            failed = f", {progress.failures:,} failed" if progress.failures else ""
            bar.at(progress.elapsed_s, f"{progress.rows_per_s:,.0f} rows/s{failed}")

        found = await run(load, told)
    if found.refused:
        raise TargetUnusable(f"model {load.model!r} at {load.host}:{load.port}: {found.refused}")
    return found


@contextlib.asynccontextmanager
async def _served(options: ServeOptions, screen: Screen) -> AsyncIterator[tuple[str, Prediction]]:
    """The URL of the ensemble and what its plan promises, while it is served."""
    planned = await prepare(options, screen)
    with runtime_folder(options.runtime_base) as folder:
        deployment = local.make_deployment(planned, options, folder, screen)
        try:
            deployment.start()
            state, _ = await local.until_settled(deployment, planned, screen)
            screen.hide()
            model = f"{state.url}/v2/models/{planned.ensemble.name}"
            # Every member sees every row, so the member with the largest batches says how many rows fill all.
            batch_rows = int(planned.matrix.sizes.sum(axis=0).max())
            yield model, Prediction(rows_per_s(planned.problem, planned.matrix), batch_rows)
        finally:
            await deployment.stop()
