"""What planning finds and costs, on the described clusters and as clusters grow; modelled, nothing runs on a device.

    python -m benchmarks.planning [--quick] [--json FILE] [--plot FILE]

Each described cluster under examples/planning is planned by worst-fit decreasing, by worst-fit with the batch sizes
tuned, by the paper's greedy, by ours and by the mixed-integer program; the table has the rows/s that the throughput
model gives each, the proven bound, the gap of ours, and the seconds. Then the cost of planning 36 members on 10 to
1,000 devices, for most rows/s and for half of them on the fewest.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from ensemble_operator.allocation.described import described
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.allocation.worstfit import fill, worst_fit

EXAMPLES = Path(__file__).parent.parent / "examples" / "planning"
GROWTH = (10, 30, 100, 300, 1000)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One described cluster: rows/s of each way to plan, the least proven bound, and seconds."""

    cluster: str
    devices: str
    worst_fit: float
    best_batch: float
    greedy_paper: float
    ours: float
    exact: float
    bound: float
    ours_gap: float
    paper_seconds: float
    ours_seconds: float
    exact_seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan of so many devices cost, and how near its bound it is; the same for half of its rows/s on the fewest.

    `fewest` is how many those are, `least` how many are proven to be needed.
    """

    devices: int
    members: int
    gap: float
    seconds: float
    fewest: int
    least: int
    fewest_seconds: float
    peak_mib: float


def best_batch_only(problem: Problem) -> Matrix:
    """Worst-fit's placement, every member at its fastest batch size as far as memory allows."""
    fastest: dict[tuple[str, str], tuple[float, int]] = {}
    for profile in problem.profiles:
        key = profile.member, profile.device_class
        fastest[key] = max(fastest.get(key, (0.0, 0)), (profile.rows_per_s, profile.batch_size))
    return fill(problem, worst_fit(problem), lambda member, kind: fastest.get((member, kind), (0.0, 0))[1], copies=1)


def compare(cluster: str, devices: str, problem: Problem) -> Comparison:
    """All ways to plan one problem."""
    options = PlanOptions()
    paper, ours, exact = (
        plan(problem, replace(options, strategy=strategy), clock=time.perf_counter)
        for strategy in ("greedy-paper", "greedy", "exact")
    )
    bound = min(ours.bound_rows_per_s, exact.bound_rows_per_s)
    return Comparison(
        cluster=cluster,
        devices=devices,
        worst_fit=rows_per_s(problem, worst_fit(problem)),
        best_batch=rows_per_s(problem, best_batch_only(problem)),
        greedy_paper=paper.predicted_rows_per_s,
        ours=ours.predicted_rows_per_s,
        exact=exact.predicted_rows_per_s,
        bound=bound,
        ours_gap=max(0.0, 1 - ours.predicted_rows_per_s / bound),
        paper_seconds=paper.seconds,
        ours_seconds=ours.seconds,
        exact_seconds=exact.seconds,
    )


def comparisons(*, quick: bool) -> list[Comparison]:
    """Every described cluster; of a series of device counts only the first and the last if `quick`."""
    compared = []
    for path in sorted(EXAMPLES.glob("*.yaml")):
        cluster = described(yaml.safe_load(path.read_text()))
        problems = (cluster.problems[0], cluster.problems[-1]) if quick else cluster.problems
        compared += [compare(cluster.name, label, problem) for label, problem in dict(problems).items()]
    return compared


def cost_of(count: int) -> Cost:
    """The cost of planning the thirty-six networks on so many GPUs. Peak memory is the process's so far."""
    document = yaml.safe_load((EXAMPLES / "thirty-six-on-1-to-16.yaml").read_text())
    document["devices"][0].pop("counts")
    document["devices"][0]["count"] = count
    ((_, problem),) = described(document).problems
    found = plan(problem, PlanOptions(), clock=time.perf_counter)
    half = PlanOptions(objective="devices", target_rows_per_s=found.predicted_rows_per_s / 2)
    fewest = plan(problem, half, clock=time.perf_counter)
    return Cost(
        devices=count,
        members=len(problem.members),
        gap=found.gap,
        seconds=found.seconds,
        fewest=int(fewest.matrix.sizes.any(axis=1).sum()),
        least=fewest.device_bound,
        fewest_seconds=fewest.seconds,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def print_comparisons(rows: list[Comparison]) -> None:
    """The table of the described clusters, as Markdown."""
    print("Seconds are those of greedy-paper / ours / exact.\n")
    print("| cluster | devices | worst-fit | best batch | greedy-paper | ours | exact | bound | gap | seconds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        figures = (row.worst_fit, row.best_batch, row.greedy_paper, row.ours, row.exact, row.bound)
        seconds = f"{row.paper_seconds:.1f} / {row.ours_seconds:.1f} / {row.exact_seconds:.1f}"
        print(
            f"| {row.cluster} | {row.devices} | "
            + " | ".join(f"{figure:.1f}" for figure in figures)
            + f" | {row.ours_gap:.1%} | {seconds} |"
        )


def plot(costs: list[Cost], path: Path) -> None:
    """Seconds over devices, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    devices = [c.devices for c in costs]
    axes.loglog(devices, [c.seconds for c in costs], marker="o", label="most rows/s")
    axes.loglog(devices, [c.fewest_seconds for c in costs], marker="s", label="half of them on the fewest devices")
    axes.legend()
    axes.set(xlabel="devices", ylabel="seconds to plan", title=f"Planning {costs[0].members} members")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first and last device count of each cluster only")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw the growth of planning cost to this file")
    arguments = parser.parse_args()
    compared = comparisons(quick=arguments.quick)
    print_comparisons(compared)
    costs = [cost_of(count) for count in GROWTH]
    print("\n| devices | members | gap | seconds | half on the fewest | proven least | seconds | peak MiB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cost in costs:
        print(
            f"| {cost.devices} | {cost.members} | {cost.gap:.2%} | {cost.seconds:.1f} | {cost.fewest} | {cost.least} | "
            f"{cost.fewest_seconds:.1f} | {cost.peak_mib:.0f} |"
        )
    if arguments.json:
        figures = {"clusters": [asdict(c) for c in compared], "growth": [asdict(c) for c in costs]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.plot:
        plot(costs, arguments.plot)


if __name__ == "__main__":
    main()
