"""`ensemble devices`: what this machine offers."""

from __future__ import annotations

import argparse

from ensemble_operator.commands.arguments import Subparsers, at_least_one
from ensemble_operator.exits import ExitCode


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "devices", help="list this machine's devices", description="List the devices that `ensemble serve` would use."
    )
    parser.add_argument("--cpu-devices", type=at_least_one, metavar="N", help="divide the CPU into N devices")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List them."""
    import asyncio

    from ensemble_operator.profiles.measuring import find_devices
    from ensemble_operator.serve.live import Screen
    from ensemble_operator.tables import devices_table

    Screen().result(devices_table(asyncio.run(find_devices(args.cpu_devices))))
    return ExitCode.OK
