"""`ensemble bench FILE|URL`: rows/s and latencies under a chosen load, against what the plan promises."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_operator.commands.arguments import Subparsers, at_least_one, seed
from ensemble_operator.commands.options import (
    above_zero,
    add_machine,
    add_output,
    cache_folder,
    duration,
    duration_or_none,
)
from ensemble_operator.exits import ExitCode

if TYPE_CHECKING:
    from ensemble_operator.load.bench import Bench
    from ensemble_operator.load.loads import Load
    from ensemble_operator.load.target import Target

CLOSED_LOOP_CLIENTS = 8
OPEN_LOOP_CLIENTS = 64


def add_to(subparsers: Subparsers) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure an ensemble under load",
        description="Put a load on a running server (URL), or on the InferenceEnsemble in FILE, served on this machine "
        "for as long as it takes. Without --rate each client asks again when it has its answer; with it, requests fall "
        "due at that rate whatever happens, and latencies count from when they were due.",
    )
    parser.add_argument(
        "target", metavar="FILE|URL", help="YAML file with an InferenceEnsemble, or http://HOST:PORT[/v2/models/NAME]"
    )
    parser.add_argument("--model", metavar="NAME", help="which model, such as ENSEMBLE.MEMBER (default: the ensemble)")
    parser.add_argument(
        "--clients",
        type=at_least_one,
        metavar="N",
        help=f"connections (default: {CLOSED_LOOP_CLIENTS}; with --rate the most at a time, {OPEN_LOOP_CLIENTS})",
    )
    parser.add_argument("--rows", type=at_least_one, default=1, metavar="N", help="of a request (default: 1)")
    parser.add_argument("--rate", type=above_zero, metavar="R", help="requests per second")
    parser.add_argument(
        "--arrivals", choices=("poisson", "constant"), default="poisson", help="under --rate (default: %(default)s)"
    )
    parser.add_argument(
        "--duration", type=duration, default="10s", metavar="TIME", help="that is counted (default: 10s)"
    )
    parser.add_argument(
        "--warmup", type=duration_or_none, default="1s", metavar="TIME", help="that is not, before it (default: 1s)"
    )
    parser.add_argument(
        "--timeout", type=duration, default="30s", metavar="TIME", help="that an answer may take (default: 30s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of rows and arrivals (default: %(default)s)")
    add_output(parser, "table", "json")
    add_machine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Put the load, and show what came of it. The exit code is 1 when nothing was answered."""
    import asyncio

    from ensemble_operator import documents
    from ensemble_operator.load import report as bench_report
    from ensemble_operator.serve.live import Screen

    with documents.standard_output_kept(args.output):
        found = asyncio.run(_until_signalled(args))
    if args.output == "table":
        Screen().result(bench_report.headline(found), bench_report.bench_table(found), *bench_report.remarks(found))
    else:
        documents.write(args.output, bench_report.bench_document(found))
    return ExitCode.OK if found.result.requests else ExitCode.UNEXPECTED


async def _until_signalled(args: argparse.Namespace) -> Bench:
    """The load; SIGTERM and SIGHUP end it, and whatever it has started, as Ctrl-C does."""
    import asyncio
    import signal

    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(_bench(args))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _bench(args: argparse.Namespace) -> Bench:
    from ensemble_operator.load import bench
    from ensemble_operator.serve.preparation import ServeOptions

    def load_on(target: Target) -> Load:
        return _load(args, target)

    if "://" in args.target:
        return await bench.bench_url(args.target, args.model, load_on)
    options = ServeOptions(
        file=Path(args.target),
        host="127.0.0.1",
        port=0,
        cpu_devices=args.cpu_devices,
        cache_folder=cache_folder(args),
        runtime_base=os.environ.get("XDG_RUNTIME_DIR"),
        link="shared",
        encryption="none",
        log_level="WARNING",
    )
    return await bench.bench_file(options, args.model, load_on)


def _load(args: argparse.Namespace, target: Target) -> Load:
    from ensemble_operator.load.loads import Load

    return Load(
        host=target.host,
        port=target.port,
        model=target.model,
        inputs=target.inputs,
        clients=args.clients or (OPEN_LOOP_CLIENTS if args.rate else CLOSED_LOOP_CLIENTS),
        rows=args.rows,
        duration_s=args.duration,
        rate_per_s=args.rate or 0.0,
        arrivals=args.arrivals,
        warmup_s=args.warmup,
        timeout_s=args.timeout,
        seed=args.seed,
    )
