"""Finds this machine's devices and measures members on them, each in a process of its own; keeps results on disk."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.errors import EnsembleError
from ensemble_operator.exits import describe
from ensemble_operator.processes import run_once
from ensemble_operator.profiles.kept import Kept, KeptProfiles, key_of, merged, missing_sizes, selected
from ensemble_operator.profiles.measurements import (
    Device,
    Download,
    Measurement,
    NotUnderstood,
    Point,
    devices_of,
    download_of,
    measurement_of,
)

WORKER = (sys.executable, "-m", "ensemble_worker")


class DevicesUnavailable(EnsembleError):
    """This machine's devices cannot be found, or not as many as asked for; the message has the worker's words."""


@dataclass(frozen=True, slots=True)
class Task:
    """One member to measure: what to load, whether its digest names the file's content, rows' tensors, batch sizes.

    `budget_s` is for its batches, with `load_included` for loading it, too.
    """

    source: ModelSource
    known_content: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]
    budget_s: float
    load_included: bool = False


async def find_devices(cpu_devices: int | None) -> tuple[Device, ...]:
    """This machine's GPUs, else its CPU partitions, as a worker sees them.

    Raises DevicesUnavailable.
    """
    lines: list[str] = []
    wanted = () if cpu_devices is None else ("--cpu-devices", str(cpu_devices))
    answer = await run_once((*WORKER, "devices", *wanted), lines.append)
    if answer.code != 0:
        raise DevicesUnavailable(_cause(answer.code, answer.errors))
    found = devices_of("".join(lines))
    if not found:
        raise DevicesUnavailable("this machine has no device")
    return found


class Measurer:
    """Measures members, as many at a time as there are devices of a class, and never twice what is on disk.

    `report` is given what is being done, `downloading` how a member's download is. With `refresh` what is on disk is
    not believed, and replaced.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        cache_folder: Path,
        report: Callable[[str], None],
        downloading: Callable[[str, Download], None] | None = None,
        *,
        refresh: bool = False,
    ) -> None:
        self._profiles = KeptProfiles(cache_folder / "profiles")
        self._models = cache_folder / "models"
        self._report = report
        self._downloading = downloading
        self._refresh = refresh
        self._free: dict[str, asyncio.Queue[Device]] = {}
        self._capacities: dict[str, int] = {}
        for device in devices:
            self._free.setdefault(device.device_class, asyncio.Queue()).put_nowait(device)
            least = self._capacities.get(device.device_class, device.capacity_bytes)
            self._capacities[device.device_class] = min(least, device.capacity_bytes)

    async def measure(self, tasks: Mapping[str, Task]) -> dict[tuple[str, str], Measurement]:
        """Every task, by the member's name, on every class of device, by (member, class).

        Raises NotUnderstood if a measuring process does not keep to what was agreed.
        """
        keys = [(name, device_class) for name in tasks for device_class in self._free]
        try:
            async with asyncio.TaskGroup() as group:
                running = {key: group.create_task(self._measure(tasks[key[0]], key[1])) for key in keys}
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others were cancelled, or say the same
        return {key: task.result() for key, task in running.items()}

    async def _measure(self, task: Task, device_class: str) -> Measurement:
        key = key_of(task.source, device_class, task.inputs, task.outputs)
        kept = self._profiles.read(key) if task.known_content and not self._refresh else Kept()
        limits = task.budget_s, self._capacities[device_class]
        sizes = missing_sizes(kept, task.sizes, *limits)
        if not sizes:
            return selected(kept, task.sizes)
        device = await self._free[device_class].get()
        try:
            self._report(f"measuring {task.source.name} on {device.name}")
            found = await self._run(replace(task, sizes=sizes), device, kept.measurement.before(sizes[0]))
        finally:
            self._free[device_class].put_nowait(device)
        known = merged(kept, found, sizes, *limits)
        if task.known_content and found.points:
            try:
                self._profiles.write(key, known)
            except OSError as error:
                self._report(f"profiles are not kept: {error.filename}: {error.strerror}")
        return selected(known, task.sizes)

    async def _run(self, task: Task, device: Device, known: Point | None) -> Measurement:
        spec = {"member": task.source, "inputs": task.inputs, "outputs": task.outputs}
        cores = ("--cores", ",".join(map(str, device.cores))) if device.cores else ()
        limit = ("--memory-limit", str(device.capacity_bytes)) if device.kind == "cpu" else ()
        arguments = (
            *WORKER, "measure", "--device", device.name, *cores, *limit, "--spec", "-",
            "--sizes", ",".join(map(str, task.sizes)), "--budget-s", f"{task.budget_s:g}",
            "--cache-dir", str(self._models), "--parent-pid", str(os.getpid()),
            *(("--load-included",) if task.load_included else ()),
            *(("--known", f"{known.batch_size}:{known.latency_s!r}") if known is not None else ()),
        )  # fmt: skip
        lines: list[str] = []
        name = task.source.name

        def said(line: str) -> None:
            self._report(f"{name}: {line}")

        def told(line: str) -> None:
            download = download_of(line)
            if download is None:
                lines.append(line)
            elif self._downloading is not None:
                self._downloading(name, download)

        answer = await run_once(arguments, told, on_error=said, stdin=msgspec.json.encode(spec))
        found = measurement_of(lines)
        if answer.code != 0 and not found.error:
            found = msgspec.structs.replace(found, error=_cause(answer.code, answer.errors))
        if not found.points and not found.error:
            raise NotUnderstood(f"measuring member {name!r} ended without a result and without an error")
        return found


def _cause(code: int, errors: Sequence[str]) -> str:
    said = [line for line in errors if line.strip()]
    return f"{said[-1]} (the worker {describe(code)})" if said else f"the worker {describe(code)}"
