"""The co-location factor of each class of GPU: measured once, with the members of the fullest worst-fit row, and kept.

`ensemble profile` and `plan` measure it; every plan of this machine reckons with what is kept. On CPU devices one batch
runs at a time, so that the factor is 1 and nothing is measured.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from ensemble_contract.libraries import execution_versions
from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.errors import DoesNotFit
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.worstfit import fill, worst_fit
from ensemble_operator.processes import run_once
from ensemble_operator.profiles.files import keep, read_kept
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.profiles.measuring import WORKER

# With loading, the whole stays below a minute for models on local disk.
BUDGET_S = 30.0
# In less nothing is learnt.
LEAST_S = 2.0


class Factor(msgspec.Struct, frozen=True):
    """What the measuring process prints, and what is kept: batches a second of each member `alone` and `together`.

    With `error` nothing was measured.
    """

    factor: float = 0.0
    alone: tuple[float, ...] = ()
    together: tuple[float, ...] = ()
    error: str = ""


class KeptFactors:
    """The factors below a cache folder, a file for each class and version of the libraries."""

    def __init__(self, cache_folder: Path) -> None:
        self._folder = cache_folder / "colocation"

    def read(self, device_class: str) -> Factor | None:
        """The factor; None where it is not known, or the file cannot be believed."""
        found = read_kept(self._file(device_class), Factor)
        return found if found is not None and 0 < found.factor < math.inf else None

    def write(self, device_class: str, factor: Factor) -> None:
        """Keep it.

        Raises OSError.
        """
        keep(self._file(device_class), factor)

    def _file(self, device_class: str) -> Path:
        parts = (device_class, execution_versions())
        return self._folder / f"{hashlib.sha256(msgspec.json.encode(parts)).hexdigest()}.json"


def fullest_rows(problem: Problem) -> dict[str, dict[str, int]]:
    """By device class of GPUs, the worst-fit row of most members, batch sizes by member; only rows of two and more.

    The sizes are those that a plan would like, as far as memory allows: small batches leave a GPU idle between kernels,
    and would promise an overlap that larger ones do not have.
    """
    try:
        matrix = fill(problem, worst_fit(problem), copies=1)
    except DoesNotFit:
        return {}
    found: dict[str, dict[str, int]] = {}
    for index, device in enumerate(problem.devices):
        row = matrix.row(index)
        if device.kind == "cuda" and len(row) > max(1, len(found.get(device.device_class, {}))):
            found[device.device_class] = row
    return found


def known_factors(devices: Iterable[Device], cache_folder: Path) -> dict[str, float]:
    """The factors that were measured on these classes of GPU before."""
    kept = KeptFactors(cache_folder)
    classes = dict.fromkeys(device.device_class for device in devices if device.kind == "cuda")
    return {name: found.factor for name in classes if (found := kept.read(name)) is not None}


class Colocating:
    """Measures factors with a worker's process, and keeps them on disk. `report` is told what goes on.

    With `refresh` what is on disk is not believed, and replaced.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        cache_folder: Path,
        report: Callable[[str], None],
        *,
        budget_s: float = BUDGET_S,
        refresh: bool = False,
    ) -> None:
        self._devices, self._cache_folder, self._report = devices, cache_folder, report
        self._budget_s, self._refresh = budget_s, refresh
        self._kept = KeptFactors(cache_folder)

    async def factors(
        self,
        rows: Mapping[str, Mapping[str, int]],
        sources: Mapping[str, ModelSource],
        tensors: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    ) -> dict[str, float]:
        """The factor of each class in `rows` (batch size by member). A class that cannot be measured is left out."""
        found = {}
        for device_class, row in rows.items():
            known = None if self._refresh else self._kept.read(device_class)
            answer = known or (
                await self._measure(device_class, row, sources, tensors)
                if self._budget_s >= LEAST_S
                else Factor(error="no time is left for it")
            )
            if answer.factor > 0:
                found[device_class] = answer.factor
            else:
                self._report(f"co-location on {device_class} is not measured, perfect sharing assumed: {answer.error}")
        return found

    async def _measure(
        self,
        device_class: str,
        row: Mapping[str, int],
        sources: Mapping[str, ModelSource],
        tensors: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    ) -> Factor:
        device = next(d for d in self._devices if d.device_class == device_class)
        self._report(f"measuring {', '.join(row)} together on {device.name}")
        inputs, outputs = tensors
        members = [
            {"source": sources[name], "inputs": inputs, "outputs": outputs, "batchSize": size}
            for name, size in row.items()
        ]
        arguments = (
            *WORKER, "colocate", "--device", device.name, "--budget-s", f"{self._budget_s:g}",
            "--memory-limit", str(device.capacity_bytes), "--cache-dir", str(self._cache_folder / "models"),
            "--parent-pid", str(os.getpid()),
        )  # fmt: skip
        lines: list[str] = []
        said = await run_once(arguments, lines.append, stdin=msgspec.json.encode({"members": members}))
        try:
            answer = msgspec.json.decode(lines[-1], type=Factor)
        except (IndexError, msgspec.DecodeError):
            return Factor(error=said.errors[-1] if said.errors else f"the worker ended with exit code {said.code}")
        if answer.factor > 0:
            self._keep(device_class, answer)
        return answer

    def _keep(self, device_class: str, answer: Factor) -> None:
        try:
            self._kept.write(device_class, answer)
        except OSError as error:
            self._report(f"co-location is not kept: {error.filename}: {error.strerror}")
