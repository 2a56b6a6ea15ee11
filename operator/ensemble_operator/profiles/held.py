"""The planning problem of what was measured, with what a device holds besides its instances. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.profiles.allowed_sizes import all_within
from ensemble_operator.profiles.measurements import UNMEASURED_OVERHEAD_BYTES, Device, Measurement

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
        sizes=ensemble.spec.batching.sizes,
        headroom=ensemble.spec.devices.memory_headroom,
        held_bytes=held_bytes(ensemble, devices, row_cache_bytes),
        colocation=colocation,
    )


def planning_problem(
    devices: Sequence[Device],
    measured: Mapping[tuple[str, str], Measurement],
    *,
    sizes: Sequence[int],
    headroom: float,
    held_bytes: Mapping[str, int],
    colocation: Mapping[str, float] | None = None,
) -> Problem:
    """The problem of placing the members that were measured, by (member, device class), on the devices.

    `sizes` are the batch sizes that may be planned. `held_bytes` is, by kind of device, what each holds besides its
    instances and an idle worker: rows. `colocation` has the factors of device classes, 1 where none is known. Raises
    InvalidProblem.
    """
    classes = {d.device_class for d in devices}
    overheads = {
        c: max((m.overhead_bytes for (_, k), m in measured.items() if k == c), default=0) or UNMEASURED_OVERHEAD_BYTES
        for c in classes
    }
    profiles = tuple(
        Profile(member, device_class, p.batch_size, p.rows_per_s, p.latency_s, p.memory_bytes)
        for (member, device_class), measurement in all_within(measured, sizes).items()
        for p in measurement.points
    )
    names = dict.fromkeys(profile.member for profile in profiles)
    return Problem(
        members=tuple(Member(name) for name in names),
        devices=tuple(
            DeviceSpec(
                d.name,
                d.device_class,
                "cpu" if d.kind == "cpu" else "cuda",
                d.capacity_bytes,
                overheads[d.device_class] + held_bytes.get(d.kind, 0),
            )
            for d in devices
        ),
        profiles=profiles,
        batch_sizes=tuple(sorted({profile.batch_size for profile in profiles})),
        headroom=headroom,
        colocation=colocation or {},
    )
