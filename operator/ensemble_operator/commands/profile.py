"""`ensemble profile FILE`: what every member costs at every batch size on this machine's devices, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_operator.commands.arguments import Subparsers
from ensemble_operator.commands.options import add_machine, add_output, cache_folder, duration
from ensemble_operator.exits import ExitCode

if TYPE_CHECKING:
    from ensemble_operator.profiles.profiling import Profiled
    from ensemble_operator.profiles.serving_cost import ServingCost


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "profile",
        help="measure what the members of an ensemble cost",
        description="Measure every member of the InferenceEnsemble in FILE at every batch size of its spec on every "
        "class of this machine's devices, and keep the results. -o yaml writes a described cluster for "
        "`ensemble plan`: change its counts and plan for more devices of the same class.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file with an InferenceEnsemble")
    add_output(parser, "table", "json", "yaml")
    parser.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="of all measuring together; the smallest batch size of each member is measured in any case (default: the "
        "spec's profileBudget)",
    )
    parser.add_argument("--force", action="store_true", help="measure again what is already known")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and show."""
    import asyncio

    from ensemble_operator import documents
    from ensemble_operator.profiles import report as profile_report
    from ensemble_operator.serve.live import Screen

    screen = Screen()
    found, cost = asyncio.run(_profiled(args))
    if args.output == "table":
        screen.result(profile_report.profile_table(found), *profile_report.remarks(found, cost))
    else:
        documents.write(args.output, profile_report.profile_document(found))
    return ExitCode.OK if any(m.points for m in found.measured.values()) else ExitCode.MODEL_UNAVAILABLE


async def _profiled(args: argparse.Namespace) -> tuple[Profiled, ServingCost | None]:
    import os

    from ensemble_operator.load.serving import serving_cost
    from ensemble_operator.profiles.profiling import profile

    cache = cache_folder(args)
    found = await profile(args.file, args.cpu_devices, args.budget, cache, force=args.force)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return found, await serving_cost(args.file, found, args.cpu_devices, cache, runtime, force=args.force)
