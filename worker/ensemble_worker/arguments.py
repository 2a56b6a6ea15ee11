"""How `python -m ensemble_worker serve` is told what it is: its arguments, and the device that they name."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ensemble_contract.pod import CPU_INSTEAD_OF_GPU
from ensemble_worker import devices, storage
from ensemble_worker.errors import DeviceUnavailable

_LOG = logging.getLogger(__name__)


NO_GPU = (
    "device {name!r} was asked for, and no GPU is visible here: check that the node runs the NVIDIA device plugin (or "
    "DRA driver) and the pod requests its resource, that podTemplate.worker.runtimeClassName is 'nvidia' "
    "where the NVIDIA container toolkit is not the default runtime, and that the node's driver works (nvidia-smi). To "
    "compute on the CPU in spite of it, set the environment variable {variable}=1"
)


def device_of(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> devices.Device:
    """The device by its name: CPU partitions are what the arguments say, GPUs are looked up.

    A GPU that is not there is a device of the kind `none`, so that the worker can say it, unless the environment allows
    CPU cores instead. Raises DeviceUnavailable for a name that is no device's.
    """
    kind, _, index = options.device.partition("-")
    if kind not in ("cpu", "cuda") or not index.isdecimal():
        raise DeviceUnavailable(f"device {options.device!r}: it must be cpu-N or cuda-N")
    if kind == "cpu":
        return _cpu_device(options, int(index), options.threads)
    found = [device for device in devices.discover() if device.name == options.device]
    if found:
        return found[0]
    if environ.get(CPU_INSTEAD_OF_GPU) == "1":
        _LOG.warning("no GPU is visible: CPU cores are taken instead, as %s allows", CPU_INSTEAD_OF_GPU)
        return _cpu_device(options, int(index), options.threads or len(devices.usable_cores()))
    return devices.missing_gpu(options.device, NO_GPU.format(name=options.device, variable=CPU_INSTEAD_OF_GPU))


def _cpu_device(options: argparse.Namespace, index: int, threads: int) -> devices.Device:
    memory_bytes = options.memory or devices.free_memory_bytes()
    if threads:
        return devices.cpu_share(index, threads, memory_bytes)
    cores = tuple(int(core) for core in options.cores.split(",") if core) or tuple(devices.usable_cores())
    return devices.cpu_device(index, cores, memory_bytes)


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = argparse.ArgumentParser(prog="python -m ensemble_worker serve", description="The worker of one device.")
    found.add_argument("--name", required=True, help="the worker's name in plans")
    found.add_argument("--device", required=True, help="cpu-N or cuda-N")
    found.add_argument("--cores", default="", help="the CPU partition's cores, such as 0,1")
    found.add_argument("--pin", action="store_true", help="keep threads on these cores")
    found.add_argument("--threads", type=_above_zero, default=0, metavar="N", help="a CPU device's threads, unpinned")
    found.add_argument(
        "--memory", type=_above_zero, default=0, metavar="BYTES", help="a CPU device's capacity (default: what is free)"
    )
    found.add_argument("--admin", required=True, metavar="ADDRESS", help="admin API: unix:PATH or tcp://HOST:PORT")
    found.add_argument("--data", required=True, metavar="ADDRESS", help="for gateways: unix:PATH or tcp://HOST:PORT")
    found.add_argument(
        "--cache-dir", type=Path, default=storage.default_cache_dir() / "models", help="where remote models are kept"
    )
    found.add_argument("--state-dir", type=Path, help="where the plan is kept for a restart")
    found.add_argument("--plan", type=Path, help="a WorkerPlan to start with, a JSON file")
    found.add_argument(
        "--mirror", type=Path, metavar="FILE", help="an EnsemblePlan that is looked at again and again, a JSON file"
    )
    found.add_argument("--keys", type=Path, help="folder of CURVE keys and the admin API's token")
    found.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    found.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return found


def _above_zero(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number
