"""`python -m ensemble_worker serve`: the process of one worker, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from aiohttp import web

from ensemble_contract.keys import Credentials
from ensemble_contract.orphan import die_with_parent
from ensemble_worker import devices, predictor
from ensemble_worker.admin import make_admin
from ensemble_worker.arguments import device_of, parser
from ensemble_worker.worker import Worker

_LOG = logging.getLogger(__name__)

EXIT_KEYS = 3
EXIT_ADDRESS = 6
EXIT_DEVICE_LOST = 70


async def serve(options: argparse.Namespace, device: devices.Device, credentials: Credentials) -> int:
    """Serve until SIGTERM or SIGINT, or until the worker cannot go on; the exit code.

    Raises OSError when an address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    worker = Worker(device, options, credentials)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.ended.set)
    admin = web.AppRunner(make_admin(worker), access_log=None)
    await admin.setup()
    try:
        await _site(admin, options.admin).start()
        worker.start()
        await worker.ended.wait()
    finally:
        stopped = await worker.close()
        await admin.cleanup()
    if worker.cannot_listen is not None:
        raise worker.cannot_listen
    code = EXIT_DEVICE_LOST if worker.device_lost else 0
    if not stopped:
        # Python waits for threads, and this one may be in a download, in torch or in a driver for minutes.
        logging.shutdown()
        os._exit(code)
    return code


def main(arguments: list[str]) -> int:
    """The exit code: 0 after SIGTERM, 3 for keys, 6 for an address, 70 for a lost device.

    Raises DeviceUnavailable.
    """
    options = parser().parse_args(arguments)
    die_with_parent(options.parent_pid)
    logging.basicConfig(level=options.log_level, format=f"%(asctime)s %(levelname)s {options.name} %(message)s")
    try:
        credentials = Credentials.read(options.keys) if options.keys else Credentials()
    except ValueError as error:
        print(f"worker {options.name}: {error}", file=sys.stderr)  # noqa: T201  # the parent reads it
        return EXIT_KEYS
    device = _prepared(device_of(options), options)
    try:
        return asyncio.run(serve(options, device, credentials))
    except OSError as error:
        print(f"worker {options.name}: cannot listen: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_ADDRESS


def _prepared(device: devices.Device, options: argparse.Namespace) -> devices.Device:
    """The device as torch can use it: a GPU that only the driver can use is as good as none."""
    if device.kind == "cpu":
        predictor.prepare_cpu(device.cores, pin=options.pin, threads=device.threads)
    cause = predictor.why_unusable(device)
    if cause:
        device = devices.missing_gpu(device.name, f"device {device.name!r} ({device.device_class}): {cause}")
    if device.error:
        _LOG.error("%s", device.error)
    return device


def _site(runner: web.AppRunner, address: str) -> web.BaseSite:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        Path(rest).unlink(missing_ok=True)
        return web.UnixSite(runner, rest)
    host, _, port = rest.removeprefix("//").rpartition(":")
    return web.TCPSite(runner, host.strip("[]"), int(port))
