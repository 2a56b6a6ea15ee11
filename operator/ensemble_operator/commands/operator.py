"""`ensemble operator`: reconcile the InferenceEnsembles of a cluster."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ensemble_operator.commands.arguments import Subparsers
from ensemble_operator.exits import ExitCode

IN_A_POD = "KUBERNETES_SERVICE_HOST"


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "operator",
        help="reconcile the InferenceEnsembles of a cluster",
        description="Reconcile the InferenceEnsembles of a cluster until Ctrl-C or SIGTERM: in a pod as its service"
        " account, elsewhere with a kubeconfig. Its settings are environment variables ENSEMBLE_OPERATOR_...; options"
        " win over them.",
    )
    parser.add_argument("--namespace", metavar="NS", help="serve this namespace only (default: all)")
    parser.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="how to reach the cluster (default in a pod: its service account; else $KUBECONFIG, ~/.kube/config)",
    )
    parser.add_argument("--context", help="context of the kubeconfig (default: its current one)")
    parser.add_argument("--log-format", choices=("json", "text"), help="one JSON object a line, or for people")
    parser.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), help="default: INFO")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reconcile until asked to stop."""
    import asyncio

    from ensemble_operator.control.logs import set_up
    from ensemble_operator.control.process import operate
    from ensemble_operator.control.reconcile import Reconciler
    from ensemble_operator.control.settings import PREFIX, Settings

    given = {name: getattr(args, name) for name in ("namespace", "log_format", "log_level")}
    chosen = {f"{PREFIX}{name.upper()}": value for name, value in given.items() if value is not None}
    settings = Settings.from_environment({**os.environ, **chosen})
    set_up(settings.log_format, settings.log_level)
    asyncio.run(operate(settings, _kubeconfig(args.kubeconfig), args.context, Reconciler))
    return ExitCode.OK


def _kubeconfig(asked: Path | None) -> Path | None:
    if asked is not None:
        return asked
    if IN_A_POD in os.environ:
        return None
    named = os.environ.get("KUBECONFIG", "").split(os.pathsep)[0]
    # Path.expanduser raises where the user has no home.
    return Path(named or os.path.expanduser("~/.kube/config"))  # noqa: PTH111
