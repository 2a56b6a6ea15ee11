"""The device that a measuring process takes, as its arguments say, and the priority that it takes it with."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from ensemble_worker import devices
from ensemble_worker.devices import Device
from ensemble_worker.errors import DeviceUnavailable

LEAST_PRIORITY = 19


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which device, and whether others come first there."""
    parser.add_argument("--device", required=True, help="cpu-0, cuda-1, ...")
    parser.add_argument("--cores", type=numbers_of, metavar="N,N", help="the cores of a CPU device")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="a CPU device's threads, on any cores")
    parser.add_argument("--nice", action="store_true", help="at the least priority, beside what serves")


def device_of(name: str, cores: list[int] | None, threads: int) -> Device:
    """A device of this machine; with `cores` a CPU partition of them, with `threads` a share of all cores.

    These are taken as told, whatever the machine's default partitions are. Raises DeviceUnavailable.
    """
    if cores is None and not threads:
        return devices.find(name, devices.discover())
    kind, _, index = name.partition("-")
    if kind != "cpu" or not index.isdigit():
        raise DeviceUnavailable(
            f"device {name!r}: --cores and --threads are for CPU devices, named cpu-0, cpu-1 and so on"
        )
    if threads or cores is None:
        return devices.cpu_share(int(index), threads, devices.free_memory_bytes())
    return devices.cpu_device(int(index), cores, devices.free_memory_bytes())


def give_way() -> None:
    """Leave cores and memory to what serves: the least priority, and the first to end where memory runs out."""
    os.nice(LEAST_PRIORITY)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def numbers_of(text: str) -> list[int]:
    """Whole numbers from 0 on, with commas between. Raises ValueError."""
    numbers = [int(part) for part in text.split(",")]
    if any(n < 0 for n in numbers):
        raise ValueError(text)
    return numbers
