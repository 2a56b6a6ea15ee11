"""Which devices this machine offers: its GPUs (NVML), or partitions of the CPU cores that this process may use.

The only file that imports pynvml. Reads /proc, /sys and the environment when called, never at import.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ensemble_worker.errors import DeviceUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

DEVICE_VARIABLE = "ENSEMBLE_DEVICE"
MAX_DEFAULT_CPU_DEVICES = 8
MAX_CPU_DEVICES = 1024
# cgroup v1 says "no limit" with the largest multiple of a page in a signed 64-bit number.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one CPU partition. `cores` are operating-system core ids (CPU only); `uuid` is NVML's (GPU only).

    `device_class` names the hardware: devices of one class share their profiles. `threads` is a CPU device's number of
    threads where it is not that of its cores. The kind `none` is a GPU that was asked for and is not there; `error`
    says so, and what to do.
    """

    name: str
    kind: str
    index: int
    device_class: str
    cores: tuple[int, ...]
    capacity_bytes: int
    uuid: str = ""
    threads: int = 0
    error: str = ""

    @property
    def thread_count(self) -> int:
        """Threads to compute with."""
        return self.threads or max(1, len(self.cores))

    def as_json(self) -> dict[str, Any]:
        """The device as `python -m ensemble_worker devices` and the admin API show it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "index": self.index,
            "deviceClass": self.device_class,
            "cores": list(self.cores),
            "capacityBytes": self.capacity_bytes,
            "uuid": self.uuid,
        }


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What control groups leave this process: CPUs (a quota, may be a fraction) and free bytes; None: no limit."""

    cpus: float | None = None
    free_bytes: int | None = None


def discover(cpu_devices: int | None = None, environ: Mapping[str, str] | None = None) -> list[Device]:
    """All GPUs; CPU partitions where there is no GPU, or `cpu_devices` or ENSEMBLE_DEVICE=cpu asks for them.

    Raises DeviceUnavailable if ENSEMBLE_DEVICE or `cpu_devices` cannot be met.
    """
    environ = os.environ if environ is None else environ
    wanted = environ.get(DEVICE_VARIABLE, "").lower()
    if wanted not in ("", "cpu", "cuda"):
        raise DeviceUnavailable(f"{DEVICE_VARIABLE}={wanted!r}: must be cpu or cuda, or not set")
    if wanted != "cpu" and cpu_devices is None:
        gpus = _gpus(environ.get("CUDA_VISIBLE_DEVICES"))
        if gpus:
            return gpus
    if wanted == "cuda":
        raise DeviceUnavailable(f"{DEVICE_VARIABLE}=cuda: NVML sees no GPU that CUDA_VISIBLE_DEVICES allows")
    return _cpus(cpu_devices)


def find(name: str, devices: Sequence[Device]) -> Device:
    """The device of that name.

    Raises DeviceUnavailable naming those there are.
    """
    for device in devices:
        if device.name == name:
            return device
    raise DeviceUnavailable(f"device {name!r}: this machine has {', '.join(d.name for d in devices)}")


def cpu_device(index: int, cores: Sequence[int], capacity_bytes: int) -> Device:
    """A CPU partition of the given cores."""
    plural = "s" if len(cores) > 1 else ""
    device_class = f"{_cpu_model()}, {len(cores)} core{plural}"
    return Device(f"cpu-{index}", "cpu", index, device_class, tuple(cores), capacity_bytes)


def cpu_share(index: int, threads: int, capacity_bytes: int) -> Device:
    """A CPU device of so many threads on whatever cores the scheduler gives: in a pod, where cores are a share of time.

    Its class is the same in all pods of as many threads, whichever nodes they are on.
    """
    return Device(f"cpu-{index}", "cpu", index, f"cpu-{threads}", (), capacity_bytes, threads=threads)


def missing_gpu(name: str, cause: str) -> Device:
    """What stands for a GPU that a worker was told to take and cannot."""
    return Device(name, "none", 0, "none", (), 0, error=cause)


def partition(cores: Sequence[int], count: int | None) -> list[tuple[int, ...]]:
    """Equal groups of neighbouring cores: one core each for up to 8 cores, else 8 groups, unless `count` says how many.

    Groups are equal, so that they are one device class; cores left over stay free for the gateway. More groups than
    cores share cores in turn.
    """
    count = min(len(cores), MAX_DEFAULT_CPU_DEVICES) if count is None else count
    if count > len(cores):
        return [(cores[i % len(cores)],) for i in range(count)]
    size = len(cores) // count
    return [tuple(cores[i * size : (i + 1) * size]) for i in range(count)]


def cgroup_limits(membership: str, root: Path) -> CgroupLimits:
    """The tightest limits from this process's control groups up to the root.

    `membership` is the text of /proc/self/cgroup, `root` where the hierarchies are mounted (cgroups(7); version 1 and
    2).
    """
    cpus: list[float] = []
    free: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders = _upwards(root, path)
            cpus += [q for f in folders if (q := _quota_v2(f)) is not None]
            free += [
                b for f in folders if (b := _free_bytes(f, "memory.max", "memory.current", "inactive_file")) is not None
            ]
        elif "cpu" in controllers.split(","):
            cpus += [q for f in _upwards(root / controllers, path) if (q := _quota_v1(f)) is not None]
        elif controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            free += [b for f in _upwards(root / controllers, path) if (b := _free_bytes(f, *names)) is not None]
    return CgroupLimits(min(cpus, default=None), min(free, default=None))


def free_memory_bytes() -> int:
    """Memory that this process may still take: what the machine has available, within its control groups."""
    available = int(psutil.virtual_memory().available)
    limit = _own_cgroup_limits().free_bytes
    return available if limit is None else min(available, limit)


def usable_cores() -> list[int]:
    """The cores that this process may use, no more than its control groups allow at a time."""
    cores = sorted(os.sched_getaffinity(0))
    quota = _own_cgroup_limits().cpus
    return cores if quota is None else cores[: max(1, math.ceil(quota))]


def _cpus(count: int | None) -> list[Device]:
    if count is not None and not 1 <= count <= MAX_CPU_DEVICES:
        raise DeviceUnavailable(f"{count} CPU devices: must be in 1..{MAX_CPU_DEVICES}")
    cores = usable_cores()
    groups = partition(cores, count)
    if len(groups) > len(cores):
        log.warning("%d CPU devices share %d cores: expect less than one core each", len(groups), len(cores))
    share = free_memory_bytes() // len(groups)
    return [cpu_device(i, group, share) for i, group in enumerate(groups)]


def _gpus(visible: str | None) -> list[Device]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPU: %s", error)
        return []
    try:
        found = []
        for i in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(i)
            parts = _mig_parts(pynvml, handle)
            if parts:
                # CUDA shows a process one part, and no whole GPU beside it ("MIG User Guide", CUDA visibility).
                return visible_parts([_gpu(pynvml, 0, part) for part in parts], visible)
            found.append(_gpu(pynvml, i, handle))
    except pynvml.NVMLError as error:
        log.warning("a GPU cannot be read, the CPU is used: %s", error)
        return []
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return visible_gpus(found, visible)


def _gpu(pynvml: Any, index: int, handle: Any) -> Device:
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Device(f"cuda-{index}", "cuda", index, f"{name}, {total / 2**30:.0f} GiB", (), total, uuid)


def _mig_parts(pynvml: Any, handle: Any) -> list[Any]:
    """The parts of a GPU in MIG mode that this container may use; none of a whole GPU."""
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        places = range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    except pynvml.NVMLError:
        return []
    parts = []
    for place in places:
        with contextlib.suppress(pynvml.NVMLError):
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
    return parts


def visible_parts(parts: Sequence[Device], visible: str | None) -> list[Device]:
    """The one part of a GPU in MIG mode that CUDA shows: the first, or the first of CUDA_VISIBLE_DEVICES."""
    wanted = (visible or "").split(",")[0].strip()
    if visible is None or wanted.isdigit():
        return list(parts[:1])
    return [part for part in parts if wanted and part.uuid.startswith(wanted)][:1]


def visible_gpus(found: Sequence[Device], visible: str | None) -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES allows, as CUDA numbers them: in its order, up to the first unknown entry.

    `found` is in PCI order. An entry is an index or the beginning of a UUID (CUDA C++ Programming Guide, "CUDA
    Environment Variables").
    """
    if visible is None:
        return list(found)
    chosen: list[Device] = []
    for entry in (e.strip() for e in visible.split(",")):
        matches = [
            d for d in found if (entry.isdigit() and d.index == int(entry)) or (entry and d.uuid.startswith(entry))
        ]
        if len(matches) != 1:
            break
        chosen.append(matches[0])
    return [Device(f"cuda-{i}", "cuda", i, d.device_class, (), d.capacity_bytes, d.uuid) for i, d in enumerate(chosen)]


def _own_cgroup_limits() -> CgroupLimits:
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return CgroupLimits()
    return cgroup_limits(membership, Path("/sys/fs/cgroup"))


def _upwards(root: Path, path: str) -> list[Path]:
    """Folders from the group up to the root, which in a container often *is* the group."""
    parts = [p for p in path.split("/") if p and p != ".."]
    return [root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _quota_v2(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return None if len(words) < 2 or words[0] == "max" else int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return None if not quota or not period or int(quota[0]) <= 0 else int(quota[0]) / int(period[0])


def _free_bytes(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """The limit less what is used; file cache that the kernel would drop first does not count as used."""
    limit, usage, stat = _words(folder / limit_name), _words(folder / usage_name), _words(folder / "memory.stat")
    if not limit or limit[0] == "max" or int(limit[0]) >= UNLIMITED_BYTES:
        return None
    used = int(usage[0]) if usage else 0
    cache = int(stat[stat.index(cache_name) + 1]) if cache_name in stat else 0
    return max(0, int(limit[0]) - max(0, used - cache))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    return platform.machine()
