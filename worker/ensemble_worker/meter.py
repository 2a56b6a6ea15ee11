"""What a measuring process holds on its device, and the cap that keeps it from taking what serves needs."""

from __future__ import annotations

import contextlib
import gc
import resource
from pathlib import Path

import psutil
import torch

from ensemble_worker import devices, predictor
from ensemble_worker.devices import Device

SHARE_OF_FREE_MEMORY = 0.8
# Threads' stacks and allocators' arenas take more than they fill.
ALLOCATOR_SLACK_BYTES = 64 << 20


class Meter:
    """Memory that this process holds on the device beyond what it held when idle."""

    def __init__(self, device: Device) -> None:
        self._process = psutil.Process()
        self._cuda = device.kind == "cuda"
        self.restart()

    def restart(self) -> None:
        """Take what is in use now for idle."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            self.idle_bytes = total - free
        else:
            predictor.return_freed_memory()
            self.idle_bytes = self._resident()
        self.reset_peak()

    def added(self) -> int:
        """Bytes added now."""
        return torch.cuda.memory_reserved() if self._cuda else max(0, self._resident() - self.idle_bytes)

    def peak_added(self) -> int:
        """The most bytes added since `reset_peak`."""
        if self._cuda:
            return torch.cuda.max_memory_reserved()
        return max(0, status_bytes("VmHWM") - self.idle_bytes, self.added())

    def reset_peak(self) -> None:
        """Forget earlier peaks (on CPUs as proc(5) says of clear_refs; where that is not allowed, they stay)."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)


def prepare(device: Device, memory_limit: int | None) -> Meter:
    """Threads and a first use of torch as an idle worker has them, then the cap."""
    if device.kind == "cuda":
        torch.cuda.set_device(device.index)
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        limit = int(SHARE_OF_FREE_MEMORY * free) if memory_limit is None else memory_limit
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return Meter(device)
    predictor.prepare_cpu(device.cores, pin=False, threads=device.threads)
    torch.nn.functional.linear(torch.ones(2, 64), torch.ones(64, 64)).softmax(-1)
    limit = int(SHARE_OF_FREE_MEMORY * devices.free_memory_bytes()) if memory_limit is None else memory_limit
    in_use = status_bytes("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    cap = in_use + limit + ALLOCATOR_SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard))
    return Meter(device)


def status_bytes(field: str) -> int:
    """A size from /proc/self/status; 0 where the kernel does not tell."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
