"""How good the allocation is: measured side by side on this machine's CPU devices, modelled on the described clusters.

    python -m benchmarks.allocation [--quick] [--ensembles digits,imagenet] [--json FILE] [--plot FILE]

Four ways to plan: worst-fit decreasing (`start`), the same placement with every member at its fastest batch size
(`best batch`, the baseline: the batch size of each network tuned, nothing else), the paper's bounded greedy, and ours.
Live, all four are pushed in turn to the same workers and gateway, again and again in an order that rotates, each for a
window under a load that keeps its batches full. In every round the networks are profiled anew, and the two layouts that
tell what serving costs run among the others, so that a machine that is now faster and now slower is so for predictions
as for measurements; medians count. Modelled, the described clusters of examples/planning add the bound.
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

import msgspec

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
from ensemble_operator.profiles.held import serving_problem
from ensemble_operator.profiles.measurements import Measurement
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
    from ensemble_operator.api import InferenceEnsemble
    from ensemble_operator.profiles.measurements import Device, Point

Profiles = dict[tuple[str, str], Measurement]

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
    subject = Subject(resource_file.load(file), tuple(await find_devices(cpu_devices)))
    profiles = [await subject.profiles(subject.ensemble.spec.batching.sizes)]
    first = subject.problem(profiles[0])
    runtime, screen = os.environ.get("XDG_RUNTIME_DIR"), Screen()
    planned = await prepare(stage_options(file, cpu_devices, CACHE, runtime), screen)
    layouts = {f"layout {index}": matrix for index, matrix in enumerate(layouts_to_measure(first))}
    async with staged(planned, CACHE, runtime, screen.wrote) as stage:
        with Bar(len(layouts) + rounds * (len(layouts) + len(WAYS)), f"measuring {name}") as bar:
            trials = Trials(stage, first, bar.at, window_s)
            windows = {layout: [await _rows_per_s(trials, matrix)] for layout, matrix in layouts.items()}
            cost = fitted(first, observed(layouts, windows))
            found = ways(subject.problem(profiles[0], cost), subject.options)
            windows |= {way: [] for way in found}
            for turn in range(rounds):
                profiles.append(await subject.profiles(used_sizes([*layouts.values(), *found.values()])))
                await _round(trials, {**layouts, **found}, turn, windows)
    medians = median_profiles(profiles)
    alone = subject.problem(medians)
    cost = fitted(alone, observed(layouts, windows))
    served = subject.problem(medians, cost)
    print_cost(name, cost)
    return [
        Measured(
            name,
            way,
            tuple(map(tuple, matrix.sizes.tolist())),
            tuple(windows[way]),
            rows_per_s(served, matrix),
            rows_per_s(alone, matrix),
        )
        for way, matrix in found.items()
    ]


@dataclass(frozen=True, slots=True)
class Subject:
    """An ensemble on this machine's devices."""

    ensemble: InferenceEnsemble
    devices: tuple[Device, ...]

    @property
    def options(self) -> PlanOptions:
        """How `ensemble serve` plans it."""
        return options_of(self.ensemble.spec.planning, copies=len(self.devices))

    async def profiles(self, sizes: Sequence[int]) -> Profiles:
        """Its networks alone at these batch sizes, measured now: profiles of before may be of a busier machine."""
        spec = replace(self.ensemble.spec, batching=replace(self.ensemble.spec.batching, sizes=tuple(sizes)))
        count = len(spec.members)
        with Bar(count, f"profiling {self.ensemble.name}") as bar:
            progress = MemberProgress(bar, sizes, count)
            effort = Effort(PROFILE_BUDGET_S, CACHE, refresh=True)
            return await measured_members(replace(self.ensemble, spec=spec), self.devices, effort, progress)

    def problem(self, profiles: Profiles, cost: ServingCost | None = None) -> Problem:
        """The problem of placing them, as served where it is known what that costs."""
        cpus = {device.device_class for device in self.devices if device.kind == "cpu"}
        served = as_served(profiles, cost, cpus) if cost is not None else profiles
        return serving_problem(self.ensemble, self.devices, served)


def observed(layouts: dict[str, Matrix], windows: dict[str, list[float]]) -> list[Observation]:
    """What the layouts were measured to answer, the medians."""
    return [Observation(matrix, statistics.median(windows[layout])) for layout, matrix in layouts.items()]


def used_sizes(matrices: Sequence[Matrix]) -> list[int]:
    """The batch sizes in these matrices, ascending."""
    return sorted({size for matrix in matrices for size in matrix.sizes.ravel().tolist() if size})


def median_profiles(profiles: Sequence[Profiles]) -> Profiles:
    """The first profiles with the median speed of each batch size over all of them that have it."""
    return {
        key: msgspec.structs.replace(found, points=tuple(_median_point(p, key, profiles) for p in found.points))
        for key, found in profiles[0].items()
    }


def _median_point(point: Point, key: tuple[str, str], profiles: Sequence[Profiles]) -> Point:
    same = [one for each in profiles for one in each[key].points if one.batch_size == point.batch_size]
    rate = statistics.median(one.rows_per_s for one in same)
    return msgspec.structs.replace(point, rows_per_s=rate, latency_s=point.batch_size / rate)


async def _round(trials: Trials, matrices: dict[str, Matrix], turn: int, windows: dict[str, list[float]]) -> None:
    names = list(matrices)
    for step in range(len(names)):
        name = names[(turn + step) % len(names)]
        windows[name].append(await _rows_per_s(trials, matrices[name]))


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
    names = ", ".join(ENSEMBLES)
    parser.add_argument("--ensembles", default="digits,imagenet", help=f"of {names} (default: %(default)s)")
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
            parser.error(f"{name!r} is not one of {names}")
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
