"""What a device of `ensemble serve` holds besides its instances and an idle worker. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble_operator.allocation.problem import Problem
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.profiles.measurements import Device, Measurement, planning_problem

ROW_CACHE_BYTES = 256 << 20


def held_bytes(ensemble: InferenceEnsemble, devices: Sequence[Device], row_cache_bytes: int = 0) -> dict[str, int]:
    """What rows take on a device, by its kind: a GPU's row cache; on CPUs a share of the row store.

    `row_cache_bytes`: and each worker's own cache, where it shares no memory with the gateway.
    """
    cpus = sum(d.kind == "cpu" for d in devices)
    store_share = ensemble.spec.batching.max_queue_bytes // max(1, cpus)
    return {"cpu": store_share + row_cache_bytes, "cuda": ROW_CACHE_BYTES}


def serving_problem(
    ensemble: InferenceEnsemble,
    devices: Sequence[Device],
    measured: Mapping[tuple[str, str], Measurement],
    *,
    row_cache_bytes: int = 0,
    colocation: Mapping[str, float] | None = None,
) -> Problem:
    """The problem of placing the members that were measured on devices of `ensemble serve`.

    `row_cache_bytes` as for `held_bytes`, `colocation` as for `planning_problem`. Raises InvalidProblem.
    """
    return planning_problem(
        devices,
        measured,
        headroom=ensemble.spec.devices.memory_headroom,
        held_bytes=held_bytes(ensemble, devices, row_cache_bytes),
        colocation=colocation,
    )
