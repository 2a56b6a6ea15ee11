"""`python -m ensemble_worker COMMAND`: the worker process, and the questions asked of a machine beforehand."""

from __future__ import annotations

import argparse
import json
import sys

from ensemble_worker import devices
from ensemble_worker.errors import WorkerError


def main(argv: list[str]) -> int:
    """Run one command; the exit code. Imports of torch and of the links wait until a command needs them."""
    parser = argparse.ArgumentParser(prog="python -m ensemble_worker", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="own one device and run the instances of a plan", add_help=False)
    commands.add_parser("measure", help="measure one member on one device", add_help=False)
    commands.add_parser("colocate", help="measure members that share one device", add_help=False)
    listing = commands.add_parser("devices", help="print this machine's devices as JSON")
    listing.add_argument("--cpu-devices", type=int, metavar="N", help="divide the CPU into N devices, even beside GPUs")
    known, rest = parser.parse_known_args(argv)
    try:
        if known.command == "serve":
            from ensemble_worker.process import main as serve

            return serve(rest)
        if known.command == "measure":
            from ensemble_worker.profiler import main as measure

            return measure(rest)
        if known.command == "colocate":
            from ensemble_worker.colocation import main as colocate

            return colocate(rest)
        if rest:
            listing.error(f"unrecognized arguments: {' '.join(rest)}")
        found = [device.as_json() for device in devices.discover(known.cpu_devices)]
    except WorkerError as error:
        sys.stderr.write(f"ensemble_worker: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"devices": found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
