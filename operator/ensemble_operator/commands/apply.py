"""`ensemble apply FILE`: change an ensemble that `ensemble serve` serves on this machine, while it serves."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ensemble_operator.commands.arguments import Subparsers
from ensemble_operator.exits import ExitCode


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "apply",
        help="change an ensemble that is served on this machine",
        description="Have the `ensemble serve` of the same name serve the InferenceEnsemble in FILE from now on: its "
        "members, weights, rule and limits may change, its input and output may not. Requests go on meanwhile; no "
        "answer mixes two versions of a member. What cannot be done changes nothing.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file with an InferenceEnsemble")
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="of the server (default: $XDG_RUNTIME_DIR/ensemble-operator/NAME.sock)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask for the change and show it."""
    import asyncio

    from ensemble_operator import resource_file
    from ensemble_operator.serve.asking import NotApplied, Wish, ask_to_apply
    from ensemble_operator.serve.control_socket import socket_path
    from ensemble_operator.serve.live import Screen
    from ensemble_operator.serve.summary import change_lines

    text, folder = resource_file.read(args.file), args.file.resolve().parent
    name = resource_file.parse_text(text, str(args.file), folder).name
    path = args.socket or socket_path(name, os.environ.get("XDG_RUNTIME_DIR"))
    screen = Screen()
    try:
        change = asyncio.run(ask_to_apply(path, Wish(name, text, str(args.file), folder), screen))
    except NotApplied as error:
        sys.stderr.write(f"ensemble: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        screen.note("not waited for: a change that has begun goes on to its end")
        raise
    screen.result(*change_lines(change))
    return ExitCode.OK
