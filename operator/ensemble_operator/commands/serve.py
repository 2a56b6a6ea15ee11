"""`ensemble serve FILE`: serve an ensemble on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ensemble_operator.commands.arguments import Subparsers, port
from ensemble_operator.commands.options import add_machine, cache_folder
from ensemble_operator.exits import ExitCode


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve an ensemble on this machine",
        description="Serve the InferenceEnsemble in FILE with processes on this machine, until Ctrl-C or SIGTERM. "
        "`ensemble apply` changes it meanwhile.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file with an InferenceEnsemble")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="port; 0: any free one (default: %(default)s)")
    add_machine(parser)
    parser.add_argument(
        "--link",
        choices=("shared", "zeromq"),
        default="shared",
        help="gateway and workers talk in shared memory, or over TCP as pods do (default: %(default)s)",
    )
    parser.add_argument(
        "--encryption",
        choices=("none", "curve"),
        default="none",
        help="of the link zeromq (default: %(default)s)",
    )
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="for `ensemble apply` (default: $XDG_RUNTIME_DIR/ensemble-operator/NAME.sock)",
    )
    parser.add_argument(
        "--log-level",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="WARNING",
        help="of the gateway's and the workers' logs (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until asked to stop."""
    import asyncio
    import signal

    from ensemble_operator.serve import local
    from ensemble_operator.serve.live import Screen
    from ensemble_operator.serve.preparation import ServeOptions

    options = ServeOptions(
        file=args.file,
        host=args.host,
        port=args.port,
        cpu_devices=args.cpu_devices,
        cache_folder=cache_folder(args),
        runtime_base=os.environ.get("XDG_RUNTIME_DIR"),
        link=args.link,
        encryption=args.encryption,
        log_level=args.log_level,
        socket=args.socket.absolute() if args.socket else None,
    )

    async def main() -> None:
        stop = local.StopRequest()
        loop = asyncio.get_running_loop()
        # SIGHUP: the terminal is gone, and with it whoever could stop us.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.ask)
        with Screen() as screen:
            await local.serve(options, screen, stop)

    asyncio.run(main())
    return ExitCode.OK
