"""`python -m ensemble_gateway`: start a gateway from its arguments."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
from pathlib import Path

import uvloop

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import GatewayPlan, decode_plan
from ensemble_gateway.app import Options, serve
from ensemble_gateway.folders import KeysFolder

EVERYWHERE = "0.0.0.0"  # noqa: S104  # a server's default
EXIT_USAGE = 2
EXIT_PLAN = 3
EXIT_ADDRESS = 6


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; the exit code says what was wrong: 2 usage, 3 plan or keys, 6 an address cannot be bound."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s gateway %(message)s")
    host, _, port = options.http.rpartition(":")
    try:
        plan = decode_plan(options.plan.read_bytes(), GatewayPlan) if options.plan else None
        keys = KeysFolder(options.keys) if options.keys else None
    except (OSError, InvalidPlan) as error:
        print(f"gateway: {options.plan}: {error}", file=sys.stderr)  # noqa: T201  # the parent reads it
        return EXIT_PLAN
    except ValueError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_PLAN
    started = Options(
        host=host.strip("[]") or EVERYWHERE,
        port=int(port),
        admin=options.admin,
        plan=plan,
        mirror=options.mirror,
        state_dir=options.state_dir,
        keys=keys,
        token=os.environ.get("ENSEMBLE_ADMIN_TOKEN", ""),
        drain_delay_s=options.drain_delay_s,
        parent_pid=options.parent_pid,
    )
    # Each client is a descriptor. The usual soft limit of 1,024 is there for programs that call select().
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        uvloop.run(serve(started))
    except OSError as error:
        print(f"gateway: cannot listen on {options.http}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        return EXIT_ADDRESS
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ensemble_gateway", description="The gateway of one ensemble.")
    parser.add_argument(
        "--http", required=True, metavar="HOST:PORT", help="where clients connect; port 0 takes a free one"
    )
    parser.add_argument("--admin", required=True, metavar="ADDRESS", help="admin API: unix:PATH or tcp://HOST:PORT")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="the first GatewayPlan, JSON")
    parser.add_argument("--mirror", type=Path, metavar="FILE", help="an EnsemblePlan, JSON, that others replace")
    parser.add_argument("--state-dir", type=Path, metavar="FOLDER", help="where the newest plan taken is kept")
    parser.add_argument(
        "--keys", type=Path, metavar="FOLDER", help="CURVE keys for tcp:// workers, and the admin API's token"
    )
    parser.add_argument(
        "--drain-delay-s",
        type=float,
        default=0.0,
        metavar="S",
        help="after SIGTERM, accept connections for so long while saying that no more shall come",
    )
    parser.add_argument("--parent-pid", type=int, default=0, help="exit when this process is gone")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
