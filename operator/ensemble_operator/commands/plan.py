"""`ensemble plan FILE`: the allocation matrix, what it is worth, and how far it is from the best possible."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_operator.commands.arguments import Subparsers, seed
from ensemble_operator.commands.options import above_zero, add_machine, add_output, cache_folder, duration
from ensemble_operator.exits import ExitCode

if TYPE_CHECKING:
    from ensemble_operator.allocation.options import PlanOptions
    from ensemble_operator.allocation.planner import Plan
    from ensemble_operator.allocation.problem import Problem
    from ensemble_operator.planning.question import Question
    from ensemble_operator.serve.live import Screen

    Planned = list[tuple[str, Problem, Plan]]


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "plan",
        help="find the allocation of an ensemble",
        description="Plan the InferenceEnsemble in FILE for this machine, measuring what is not known, or for devices "
        "and with profiles described elsewhere. FILE may also describe a whole cluster.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file with an InferenceEnsemble or a cluster")
    parser.add_argument("--inventory", type=Path, metavar="FILE", help="the devices to plan for, described")
    parser.add_argument("--profiles", type=Path, metavar="FILE", help="what members cost: `ensemble profile -o yaml`")
    add_output(parser, "table", "json", "yaml")
    parser.add_argument("--explain", action="store_true", help="say why each instance is where it is")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the matrix to a .png, .svg or .pdf file")
    parser.add_argument("--strategy", choices=("greedy", "greedy-paper", "exact"), help="instead of the resource's")
    parser.add_argument(
        "--evaluate",
        choices=("model", "live"),
        help="score candidates by the model of their throughput, or run each on this machine (default: the resource's)",
    )
    parser.add_argument(
        "--window", type=duration, metavar="TIME", help="that answers of a live candidate are counted (default: 2s)"
    )
    parser.add_argument("--objective", choices=("throughput", "devices"), help="instead of the resource's")
    parser.add_argument(
        "--target-throughput", type=above_zero, metavar="ROWS_PER_S", help="to reach with --objective devices"
    )
    parser.add_argument("--seed", type=seed, help="of the search, instead of the resource's")
    parser.add_argument("--time-limit", type=duration, metavar="TIME", help="of one exact search, such as 5s")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and show."""
    import asyncio

    from ensemble_operator.documents import standard_output_kept
    from ensemble_operator.planning import matrix_plot
    from ensemble_operator.serve.live import Screen

    if args.plot:
        matrix_plot.check_plot(args.plot)
    screen = Screen()
    with standard_output_kept(args.output):
        asked, found = asyncio.run(_planned(args, screen))
    if args.output == "table":
        _show(screen, asked, found, explain=args.explain)
    else:
        _write(args.output, asked, found, explain=args.explain)
    if args.plot:
        label, problem, last = found[-1]
        matrix_plot.plot_matrix(f"{asked.name} on {label}", problem, last, args.plot)
        screen.note(f"drawn to {args.plot}")
    return ExitCode.OK


async def _planned(args: argparse.Namespace, screen: Screen) -> tuple[Question, Planned]:
    import time

    from ensemble_operator.allocation.errors import InvalidProblem
    from ensemble_operator.allocation.planner import plan
    from ensemble_operator.planning import question as planning

    sources = planning.Sources(args.file, args.inventory, args.profiles, args.cpu_devices, cache_folder(args))
    asked = await planning.question(sources)
    try:
        options = planning.plan_options(asked.planning, args)
    except InvalidProblem as error:
        raise planning.with_source(error, str(args.file)) from None
    evaluate = args.evaluate or (asked.planning.evaluate if asked.planning else "model")
    if evaluate == "live" and asked.here:
        return asked, [
            (label, problem, await _live(args, problem, options, screen)) for label, problem in asked.problems
        ]
    if evaluate == "live":
        screen.warn("candidates for devices or profiles of elsewhere cannot run here: they are scored by the model")
    return asked, [(label, problem, plan(problem, options, clock=time.monotonic)) for label, problem in asked.problems]


async def _live(args: argparse.Namespace, problem: Problem, options: PlanOptions, screen: Screen) -> Plan:
    import os

    from ensemble_operator.load.stage import stage_options
    from ensemble_operator.planning.live import plan_here

    serving = stage_options(args.file, args.cpu_devices, cache_folder(args), os.environ.get("XDG_RUNTIME_DIR"))
    return await plan_here(serving, problem, options, screen, args.window)


def _show(screen: Screen, asked: Question, found: Planned, *, explain: bool) -> None:
    """The table of a series, if it is one, and the matrix of its last entry."""
    from ensemble_operator.bar import screen_width
    from ensemble_operator.planning import matrix_table

    screen.result(f"{asked.name}: {asked.source.strip()}")
    if len(found) > 1:
        screen.result("", matrix_table.series_table([(label, plan) for label, _, plan in found]))
    label, problem, plan = found[-1]
    screen.result("", label, matrix_table.matrix_table(problem, plan, screen_width()), *matrix_table.summary(plan))
    if explain:
        for name, _, explained in found:
            screen.result("", *([f"{name}:"] if len(found) > 1 else []), explained.explanation.text())


def _write(form: str, asked: Question, found: Planned, *, explain: bool) -> None:
    from ensemble_operator.documents import write
    from ensemble_operator.planning.matrix_table import plan_document

    plans = [plan_document(label, problem, plan, explain=explain) for label, problem, plan in found]
    write(form, {"name": asked.name, "source": asked.source.strip(), "plans": plans})
