"""Finds this machine's devices and measures members on them, each in a process of its own; keeps results on disk."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.errors import EnsembleError
from ensemble_operator.exits import describe
from ensemble_operator.processes import run_once
from ensemble_operator.profiles.measurements import (
    Device,
    Download,
    Measurement,
    NotUnderstood,
    devices_of,
    download_of,
    measurement_of,
)

WORKER = (sys.executable, "-m", "ensemble_worker")
# A profile of other versions of these is of another program.
LIBRARIES = ("torch", "onnxruntime")


class DevicesUnavailable(EnsembleError):
    """This machine's devices cannot be found, or not as many as asked for; the message has the worker's words."""


@dataclass(frozen=True, slots=True)
class Task:
    """One member to measure: what to load, whether its digest names the file's content, rows' tensors, batch sizes."""

    source: ModelSource
    known_content: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sizes: tuple[int, ...]
    budget_s: float


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

    `report` is given what is being done, `downloading` how a member's download is.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        cache_folder: Path,
        report: Callable[[str], None],
        downloading: Callable[[str, Download], None] | None = None,
    ) -> None:
        self._profiles = cache_folder / "profiles"
        self._models = cache_folder / "models"
        self._report = report
        self._downloading = downloading
        self._free: dict[str, asyncio.Queue[Device]] = {}
        for device in devices:
            self._free.setdefault(device.device_class, asyncio.Queue()).put_nowait(device)

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
        kept = self._profiles / f"{_key(task, device_class)}.json"
        if task.known_content:
            # What is there but cannot be read or believed is measured again.
            with suppress(OSError, msgspec.DecodeError):
                return msgspec.json.decode(kept.read_bytes(), type=Measurement)
        device = await self._free[device_class].get()
        try:
            self._report(f"measuring {task.source.name} on {device.name}")
            found = await self._run(task, device)
        finally:
            self._free[device_class].put_nowait(device)
        if task.known_content and found.points and not found.error:
            self._keep(kept, found)
        return found

    async def _run(self, task: Task, device: Device) -> Measurement:
        spec = {"member": task.source, "inputs": task.inputs, "outputs": task.outputs}
        cores = ("--cores", ",".join(map(str, device.cores))) if device.cores else ()
        limit = ("--memory-limit", str(device.capacity_bytes)) if device.kind == "cpu" else ()
        arguments = (
            *WORKER, "measure", "--device", device.name, *cores, *limit, "--spec", "-",
            "--sizes", ",".join(map(str, task.sizes)), "--budget-s", f"{task.budget_s:g}",
            "--cache-dir", str(self._models), "--parent-pid", str(os.getpid()),
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

    def _keep(self, path: Path, found: Measurement) -> None:
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(msgspec.json.encode(found))
            partial.replace(path)
        except OSError as error:
            self._report(f"profiles are not kept: {path.parent}: {error.strerror}")


def _key(task: Task, device_class: str) -> str:
    """What a profile depends on, as a file name."""
    versions = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    parts = (task.source.digest, device_class, versions, task.sizes, task.inputs, task.outputs)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _cause(code: int, errors: Sequence[str]) -> str:
    said = [line for line in errors if line.strip()]
    return f"{said[-1]} (the worker {describe(code)})" if said else f"the worker {describe(code)}"
