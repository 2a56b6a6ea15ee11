"""`ensemble crd`: the CustomResourceDefinition, as YAML."""

from __future__ import annotations

import argparse
import sys

from ensemble_operator.commands.arguments import Subparsers
from ensemble_operator.exits import ExitCode


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "crd",
        help="print the CustomResourceDefinition",
        description="Print the CustomResourceDefinition of InferenceEnsemble as YAML, for `kubectl apply -f -`.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 - every command takes them
    """Print it."""
    from ensemble_operator.crd import definition, render

    sys.stdout.write(render(definition()))
    return ExitCode.OK
