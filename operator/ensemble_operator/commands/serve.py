"""`ensemble serve FILE`: serve an ensemble on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ensemble_operator.commands.arguments import Subparsers, at_least_one, port
from ensemble_operator.exits import ExitCode


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "serve",
        help="serve an ensemble on this machine",
        description="Serve the InferenceEnsemble in FILE with processes on this machine, until Ctrl-C or SIGTERM.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML file with an InferenceEnsemble")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="port; 0: any free one (default: %(default)s)")
    parser.add_argument(
        "--cpu-devices",
        type=at_least_one,
        metavar="N",
        help="divide the CPU into N devices (default: all GPUs; without any, one device a core, at most 8)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where models and profiles are kept (default: $XDG_CACHE_HOME/ensemble-operator)",
    )
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
        cache_folder=(args.cache_dir or _cache_folder()).absolute(),
        runtime_base=os.environ.get("XDG_RUNTIME_DIR"),
        link=args.link,
        encryption=args.encryption,
        log_level=args.log_level,
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


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG Base Directory Specification.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ensemble-operator"
