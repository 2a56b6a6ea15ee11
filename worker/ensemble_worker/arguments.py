"""How `python -m ensemble_worker serve` is told what it is: its arguments, and the device that they name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ensemble_worker import devices


def device_of(options: argparse.Namespace) -> devices.Device:
    """The device by its name: CPU partitions are what the arguments say, GPUs are looked up.

    Raises DeviceUnavailable.
    """
    kind, _, index = options.device.partition("-")
    if kind == "cpu":
        cores = tuple(int(core) for core in options.cores.split(",") if core) or tuple(sorted(os.sched_getaffinity(0)))
        return devices.cpu_device(int(index or 0), cores, devices.free_memory_bytes())
    return devices.find(options.device, devices.discover())


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = argparse.ArgumentParser(prog="python -m ensemble_worker serve", description="The worker of one device.")
    found.add_argument("--name", required=True, help="the worker's name in plans")
    found.add_argument("--device", required=True, help="cpu-N or cuda-N")
    found.add_argument("--cores", default="", help="the CPU partition's cores, such as 0,1")
    found.add_argument("--pin", action="store_true", help="keep threads on these cores")
    found.add_argument("--admin", required=True, metavar="ADDRESS", help="admin API: unix:PATH or tcp://HOST:PORT")
    found.add_argument("--data", required=True, metavar="ADDRESS", help="for gateways: unix:PATH or tcp://HOST:PORT")
    found.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache/ensemble-operator/models")
    found.add_argument("--state-dir", type=Path, help="where the plan is kept for a restart")
    found.add_argument("--plan", type=Path, help="a WorkerPlan to start with, a JSON file")
    found.add_argument("--keys", type=Path, help="folder of CURVE keys for a tcp:// data address")
    found.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    found.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return found
