"""The command `ensemble`: finds the subcommand, and turns what went wrong into one message and an exit code."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder

from ensemble_operator.commands import apply, bench, crd, devices, operator, plan, profile, serve
from ensemble_operator.exits import ExitCode

COMMANDS = (serve, apply, plan, profile, bench, devices, crd, operator)

EPILOG = """exit codes:
  0  done, or stopped as asked
  1  something unexpected
  2  wrong usage
  3  the resource, or a description to plan for, cannot be read or is not valid
  4  a model cannot be loaded, and no quorum is left without it
  5  the members do not fit into the memory of the devices
  6  the address cannot be listened on
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="ensemble",
        description="Serve ensembles of deep neural networks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ensemble {_version()}{_data_plane()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        # Whoever read our output has enough of it. The interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # The table of errors imports all that raises them, scipy too: 45 MiB that the operator's process does without.
        from ensemble_operator.exit_codes import EXPECTED, exit_code_of

        if not isinstance(error, EXPECTED):
            raise
        print(f"ensemble: {error}", file=sys.stderr)
        return exit_code_of(error)
    return code


def _version() -> str:
    try:
        return importlib.metadata.version("ensemble-operator")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _data_plane() -> str:
    """Whether what serves here is compiled, which makes it faster; found without importing it."""
    gateway = importlib.util.find_spec("ensemble_gateway")
    engine = gateway and PathFinder.find_spec("engine", gateway.submodule_search_locations)
    if not (engine and engine.origin):
        return ""
    return f", data plane {'compiled' if engine.origin.endswith(tuple(EXTENSION_SUFFIXES)) else 'not compiled'}"
