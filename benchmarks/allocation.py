"""How good the allocation is: measured side by side on this machine's CPU devices, modelled on the described clusters.

    python -m benchmarks.allocation [--quick] [--ensembles digits,cnn] [--json FILE] [--plot FILE]

Four ways to plan: worst-fit decreasing (`start`), the same placement with every member at its fastest batch size
(`best batch`, the baseline: the batch size of each network tuned, nothing else), the paper's bounded greedy, and ours.
Live, all four are pushed in turn to the same workers and gateway, again and again in an order that rotates, each for a
window under a load that keeps its batches full; medians are shown, with what the model promised. Its cost of serving
is fitted to two other layouts, measured before. Modelled, the described clusters of examples/planning add the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import planning, preparation
from ensemble_operator import resource_file
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import plan
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.allocation.worstfit import worst_fit
from ensemble_operator.bar import Bar
from ensemble_operator.load.live import Trials
from ensemble_operator.load.stage import stage_options, staged
from ensemble_operator.planning.settings import options_of
from ensemble_operator.profiles.held import held_bytes
from ensemble_operator.profiles.measurements import planning_problem
from ensemble_operator.profiles.measuring import find_devices
from ensemble_operator.profiles.profiling import Effort, measured_members
from ensemble_operator.profiles.progress_notes import MemberProgress
from ensemble_operator.profiles.serving_cost import Observation, ServingCost, as_served, fitted, layouts_to_measure
from ensemble_operator.serve.live import Screen
from ensemble_operator.serve.preparation import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ensemble_operator.allocation.matrix import Matrix
    from ensemble_operator.allocation.problem import Problem

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "bench" / "allocation"
DIGITS = ROOT / "examples" / "digits" / "ensemble.yaml"
IMAGENET = ROOT / "examples" / "imagenet-lite" / "ensemble.yaml"
ENSEMBLES = ("digits", "cnn", "imagenet")
WAYS = ("start", "best batch", "greedy-paper", "ours")
BASELINE = "best batch"
PROFILE_BUDGET_S = 40.0
# Aimed at, of predicted against measured throughput.
AIM = 0.15


@dataclass(frozen=True, slots=True)
class Measured:
    """One way on one ensemble: rows/s by window, and what the model says with the cost of serving and without."""

    ensemble: str
    way: str
    matrix: tuple[tuple[int, ...], ...]
    windows: tuple[float, ...]
    predicted: float
    networks_alone: float

    @property
    def median(self) -> float:
        """The rows/s that count."""
        return statistics.median(self.windows)

    @property
    def error(self) -> float:
        """By which share the prediction is off; infinite where nothing was answered."""
        return abs(self.predicted / self.median - 1) if self.median else float("inf")


def resource_of(name: str, cache: Path) -> Path:
    """The file of an ensemble, its models made first where they are not there."""
    if name == "digits":
        if not all((DIGITS.parent / "models" / f"{m}.pt2").exists() for m in ("mlp", "cnn", "deep-cnn")):
            preparation.run_script(DIGITS.parent / "train.py")
        return DIGITS
    if name == "imagenet":
        preparation.prepare("imagenet", cache.parent)
        return IMAGENET
    return preparation.prepare("cnn", cache.parent).resource


def ways(problem: Problem, options: PlanOptions) -> dict[str, Matrix]:
    """The matrix of each way, by the model."""
    paper = plan(problem, replace(options, strategy="greedy-paper"), clock=time.monotonic)
    ours = plan(problem, options, clock=time.monotonic)
    return {
        "start": worst_fit(problem),
        "best batch": planning.best_batch_only(problem),
        "greedy-paper": paper.matrix,
        "ours": ours.matrix,
    }


async def measure(name: str, file: Path, cpu_devices: int, rounds: int, window_s: float) -> list[Measured]:
    """All ways on one ensemble, interleaved."""
    ensemble, devices = resource_file.load(file), await find_devices(cpu_devices)
    sizes = ensemble.spec.batching.sizes
    with Bar(len(ensemble.spec.members), f"profiling {name}") as bar:
        progress = MemberProgress(bar, sizes, len(ensemble.spec.members))
        # Profiles of earlier runs may be of a busy machine.
        effort = Effort(PROFILE_BUDGET_S, CACHE, refresh=True)
        measured = await measured_members(ensemble, devices, effort, progress)
    memory = {"headroom": ensemble.spec.devices.memory_headroom, "held_bytes": held_bytes(ensemble, devices)}
    alone = planning_problem(devices, measured, **memory)  # type: ignore[arg-type]
    options = options_of(ensemble.spec.planning, copies=len(devices))
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    screen = Screen()
    planned = await prepare(stage_options(file, cpu_devices, CACHE, runtime), screen)
    calibration = layouts_to_measure(alone)
    total = len(calibration) + rounds * len(WAYS)
    async with staged(planned, CACHE, runtime, screen.wrote) as stage:
        with Bar(total, f"measuring {name}") as bar:
            trials = Trials(stage, alone, bar.at, window_s)
            seen = [Observation(matrix, await _rows_per_s(trials, matrix)) for matrix in calibration]
            cost = fitted(alone, seen)
            served = as_served(measured, cost, {d.device_class for d in devices if d.kind == "cpu"})
            problem = planning_problem(devices, served, **memory)  # type: ignore[arg-type]
            matrices = ways(problem, options)
            windows = await _interleaved(trials, matrices, rounds)
    print_cost(name, cost)
    return [
        Measured(
            name,
            way,
            tuple(map(tuple, matrix.sizes.tolist())),
            tuple(windows[way]),
            rows_per_s(problem, matrix),
            rows_per_s(alone, matrix),
        )
        for way, matrix in matrices.items()
    ]


async def _interleaved(trials: Trials, matrices: dict[str, Matrix], rounds: int) -> dict[str, list[float]]:
    names = list(matrices)
    windows: dict[str, list[float]] = {way: [] for way in names}
    for turn in range(rounds):
        for step in range(len(names)):
            way = names[(turn + step) % len(names)]
            windows[way].append(await _rows_per_s(trials, matrices[way]))
    return windows


async def _rows_per_s(trials: Trials, matrix: Matrix) -> float:
    score = await trials.measure(matrix)
    if score.failure:
        raise SystemExit(f"{matrix.sizes.tolist()} does not answer: {score.failure}")
    return score.rows_per_s


def print_cost(name: str, cost: ServingCost) -> None:
    """What serving was found to cost."""
    figures = f"{cost.batch_s * 1e6:.0f} us a batch, {cost.row_s * 1e6:.1f} us a row of each member"
    print(f"{name}: serving costs a device {figures}", file=sys.stderr)


def live_table(found: Sequence[Measured]) -> str:
    """Measured rows/s, their ratio to the baseline, and how far off predictions were, as Markdown."""
    lines = [
        "| ensemble | way | rows/s | least to most | to baseline | predicted | error | networks alone |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    base = {m.ensemble: m.median for m in found if m.way == BASELINE}
    lines += [
        f"| {one.ensemble} | {one.way} | {one.median:,.1f} | {min(one.windows):,.1f} to {max(one.windows):,.1f} | "
        f"{one.median / base[one.ensemble]:.2f} | {one.predicted:,.1f} | {one.error:.0%} | {one.networks_alone:,.1f} |"
        for one in found
    ]
    errors = [one.error for one in found]
    median = statistics.median(errors)
    verdict = "is within" if median <= AIM else "MISSES"
    lines += ["", f"Predicted against measured: median error {median:.0%}, which {verdict} the aim of {AIM:.0%}."]
    return "\n".join(lines)


def plot(found: Sequence[Measured], clusters: Sequence[planning.Comparison], path: Path) -> None:
    """Ratios to the baseline, live and modelled, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 2))
    live = {(m.ensemble, m.way): m.median for m in found}
    groups = list(dict.fromkeys(m.ensemble for m in found))
    _bars(
        left, groups, {way: [live[g, way] / live[g, BASELINE] for g in groups] for way in WAYS}, "measured, CPU devices"
    )
    labels = [f"{c.cluster}\n{c.devices.split(' + ')[0]}" for c in clusters]
    modelled = {
        "start": [c.worst_fit / c.best_batch for c in clusters],
        "best batch": [1.0 for _ in clusters],
        "greedy-paper": [c.greedy_paper / c.best_batch for c in clusters],
        "ours": [c.ours / c.best_batch for c in clusters],
        "bound": [c.bound / c.best_batch for c in clusters],
    }
    _bars(right, labels, modelled, "modelled, described clusters")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(axes: object, groups: Sequence[str], series: dict[str, list[float]], title: str) -> None:
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [at + (index - (len(series) - 1) / 2) * width for at in range(len(groups))]
        axes.bar(places, values, width, label=name)  # type: ignore[attr-defined]
    axes.set_xticks(range(len(groups)), groups, fontsize=7, rotation=30, ha="right")  # type: ignore[attr-defined]
    axes.set(title=title, ylabel="rows/s, best batch = 1", yscale="log")  # type: ignore[attr-defined]
    axes.grid(visible=True, axis="y", alpha=0.3)  # type: ignore[attr-defined]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocation", description=__doc__)
    parser.add_argument("--ensembles", default="digits,cnn", help=f"of {', '.join(ENSEMBLES)} (default: %(default)s)")
    parser.add_argument("--cpu-devices", type=int, default=2, help="to divide the CPU into (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="windows of each way (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=3.0, help="seconds of a window (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds of short windows")
    parser.add_argument("--only", choices=("live", "model"), help="one of the two parts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them to this file")
    given = parser.parse_args(arguments)
    given.ensembles = given.ensembles.split(",")
    for name in given.ensembles:
        if name not in ENSEMBLES:
            parser.error(f"{name!r} is not one of {', '.join(ENSEMBLES)}")
    if given.rounds < 1 or given.cpu_devices < 1 or not given.window_s > 0:
        parser.error("--rounds and --cpu-devices must be at least 1, and --window-s above 0")
    if given.quick:
        given.rounds, given.window_s = 2, min(given.window_s, 1.0)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write what was asked for."""
    given = parse(arguments)
    found: list[Measured] = []
    if given.only != "model":
        for name in given.ensembles:
            file = resource_of(name, CACHE)
            found += asyncio.run(measure(name, file, given.cpu_devices, given.rounds, given.window_s))
        print(live_table(found), end="\n\n")
    clusters = [] if given.only == "live" else planning.comparisons(quick=True)
    if clusters:
        planning.print_comparisons(clusters)
    if given.json:
        figures = {"live": [asdict(m) for m in found], "clusters": [asdict(c) for c in clusters]}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")
    if given.plot and found and clusters:
        plot(found, clusters, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
