"""What serving costs besides the networks, where devices are cores that gateway, worker and clients share.

A batch of b rows that a network alone answers in t seconds takes a CPU device t + batch_s + b * row_s: to receive and
answer the batch, and to take its rows from clients and give them their answers, whose time is that of the same cores.
On GPUs others do that meanwhile, and it costs nothing here.

Two layouts tell both: every member on every one of n alike devices, at small and at large batches. With M members and
T rows/s measured, n / T = sum over members of (t / b + batch_s / b + row_s).
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ensemble_contract.libraries import execution_versions
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import is_feasible
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.worstfit import preferred_batch_size
from ensemble_operator.profiles.files import keep, read_kept
from ensemble_operator.profiles.measurements import Device, Measurement, Point


class ServingCost(msgspec.Struct, frozen=True, rename="camel"):
    """Seconds of a CPU device for every batch, and for every row of it.

    `spread` is from the slowest to the fastest window of a layout, over its median: the larger one of the two layouts.
    """

    batch_s: float = 0.0
    row_s: float = 0.0
    spread: float = 0.0


# Where it is not measured: a batch is never free, and without this the noise of short measurements chooses among sizes
# that the network alone runs alike. `ensemble profile` measures what it is.
UNMEASURED = ServingCost(batch_s=100e-6)


@dataclass(frozen=True, slots=True)
class Observation:
    """A layout of every member on every device, and what it was measured to answer."""

    matrix: Matrix
    rows_per_s: float


def layouts_to_measure(problem: Problem) -> tuple[Matrix, ...]:
    """Every member on every device, at its smallest and at its preferred batch size; none where that does not fit.

    None either where the devices are not alike, or not CPUs.
    """
    classes = {(device.device_class, device.kind) for device in problem.devices}
    if len(classes) != 1 or next(iter(classes))[1] != "cpu":
        return ()
    ((device_class, _),) = classes
    known: dict[str, list[int]] = {}
    for profile in problem.profiles:
        if profile.device_class == device_class and profile.batch_size in problem.batch_sizes:
            known.setdefault(profile.member, []).append(profile.batch_size)
    prefer = preferred_batch_size(problem)
    rows = [
        [min(known.get(m.name, [0])) for m in problem.members],
        [prefer(m.name, device_class) for m in problem.members],
    ]
    matrices = tuple(Matrix.of(problem, [row] * len(problem.devices)) for row in rows)
    return matrices if rows[0] != rows[1] and all(is_feasible(problem, m) for m in matrices) else ()


def fitted(problem: Problem, observations: Sequence[Observation]) -> ServingCost:
    """The costs that explain what was measured; nothing below 0, and nothing at all from fewer than two layouts."""
    rates = {(p.member, p.batch_size): p.rows_per_s for p in problem.profiles}
    batches, rows, seconds = [], [], []
    for seen in observations:
        if seen.rows_per_s > 0:
            cells = list(seen.matrix.row(0).items())
            alone_s = sum(1 / rates[member, size] for member, size in cells)
            batches.append(sum(1 / size for _, size in cells))
            rows.append(float(len(cells)))
            seconds.append(len(seen.matrix.devices) / seen.rows_per_s - alone_s)
    if len(seconds) < 2:
        return ServingCost()
    # Relative errors count, for throughputs of the two may be orders of magnitude apart.
    scale = 1 / np.array([len(s.matrix.devices) / s.rows_per_s for s in observations if s.rows_per_s > 0])
    system, right = np.array([batches, rows]).T * scale[:, None], np.array(seconds) * scale
    (batch_s, row_s), *_ = np.linalg.lstsq(system, right, rcond=None)
    if batch_s < 0:
        batch_s, row_s = 0.0, float(system[:, 1] @ right / (system[:, 1] @ system[:, 1]))
    elif row_s < 0:
        batch_s, row_s = float(system[:, 0] @ right / (system[:, 0] @ system[:, 0])), 0.0
    return ServingCost(max(0.0, float(batch_s)), max(0.0, float(row_s)))


def cost_of(problem: Problem, windows: Mapping[Matrix, Sequence[float]]) -> ServingCost:
    """The cost from rows/s of each layout in several windows, by their medians."""
    medians = {matrix: statistics.median(rates) for matrix, rates in windows.items()}
    found = fitted(problem, [Observation(matrix, rate) for matrix, rate in medians.items()])
    spread = max((max(rates) - min(rates)) / medians[matrix] for matrix, rates in windows.items())
    return msgspec.structs.replace(found, spread=spread)


def as_served(
    measured: Mapping[tuple[str, str], Measurement], cost: ServingCost, cpu_classes: set[str]
) -> dict[tuple[str, str], Measurement]:
    """The measurements with the cost of serving in those of CPU devices."""
    return {
        (member, device_class): msgspec.structs.replace(
            found, points=tuple(_with_cost(point, cost) for point in found.points)
        )
        if device_class in cpu_classes
        else found
        for (member, device_class), found in measured.items()
    }


def _with_cost(point: Point, cost: ServingCost) -> Point:
    seconds = point.batch_size / point.rows_per_s + cost.batch_s + point.batch_size * cost.row_s
    return msgspec.structs.replace(point, rows_per_s=point.batch_size / seconds, latency_s=seconds)


class KeptCosts:
    """What serving was measured to cost, below a cache folder; a file for each kind of ensemble and devices."""

    def __init__(self, cache_folder: Path) -> None:
        self._folder = cache_folder / "serving"

    def read(self, key: str) -> ServingCost | None:
        """The cost; None where it is not known, or the file cannot be believed."""
        return read_kept(self._folder / f"{key}.json", ServingCost)

    def write(self, key: str, cost: ServingCost) -> None:
        """Keep it.

        Raises OSError.
        """
        keep(self._folder / f"{key}.json", cost)


def cost_key(
    tensors: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]], members: int, devices: Sequence[Device]
) -> str:
    """What the cost depends on, as a file name: rows and answers, how many members, devices and libraries."""
    classes = sorted(device.device_class for device in devices)
    return hashlib.sha256(msgspec.json.encode((tensors, members, classes, execution_versions()))).hexdigest()


def with_known_cost(
    measured: Mapping[tuple[str, str], Measurement],
    devices: Sequence[Device],
    tensors: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
    cache_folder: Path,
) -> dict[tuple[str, str], Measurement]:
    """The measurements as served, by what serving was measured to cost on these devices; else UNMEASURED is."""
    members = len({member for member, _ in measured})
    cost = KeptCosts(cache_folder).read(cost_key(tensors, members, devices))
    cpus = {device.device_class for device in devices if device.kind == "cpu"}
    return as_served(measured, cost or UNMEASURED, cpus)
