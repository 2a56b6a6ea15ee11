"""Profiles on disk: a file for each model on each class of device, one entry a batch size, whoever measured it.

Which entries are missing is decided by pure functions; `KeptProfiles` reads and writes the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ensemble_contract.libraries import execution_versions
from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.profiles.files import keep, read_kept
from ensemble_operator.profiles.measurements import Measurement

# As the measuring process: a larger batch is worth its time only while the last one brought so much more.
WORTHWHILE_GAIN = 1.02
# What the time did not suffice for is tried again with at least so much more of it.
MORE_TIME = 2.0


class Kept(msgspec.Struct, frozen=True, rename="camel"):
    """What is known of a model on a class of device, with the most time and memory that measuring it ever had.

    The measurement's `error` is that of `failed_size`, the smallest batch size that did not run; 0 if all ran. `fixed`:
    the model takes only the batch that it was exported with.
    """

    measurement: Measurement = Measurement()
    budget_s: float = 0.0
    capacity_bytes: int = 0
    failed_size: int = 0
    fixed: bool = False


def missing_sizes(kept: Kept, sizes: Sequence[int], budget_s: float, capacity_bytes: int) -> tuple[int, ...]:
    """Which of these batch sizes to measure, ascending.

    Not those that are known, nor larger ones than a batch that brought no more than smaller ones, nor those that time
    or memory did not suffice for, unless there is more of it now.
    """
    points = kept.measurement.points
    if not points:
        return tuple(sorted(set(sizes)))
    if kept.fixed:
        return ()
    known = {point.batch_size for point in points}
    largest = max(known)
    wanted = [size for size in sorted(set(sizes)) if size not in known]
    if kept.failed_size and capacity_bytes <= kept.capacity_bytes:
        wanted = [size for size in wanted if size < kept.failed_size]
    if not _still_gains(kept.measurement) or budget_s < MORE_TIME * kept.budget_s:
        wanted = [size for size in wanted if size < largest]
    return tuple(wanted)


def merged(kept: Kept, found: Measurement, sizes: Sequence[int], budget_s: float, capacity_bytes: int) -> Kept:
    """What is known after these batch sizes were measured; what is new wins."""
    before = kept.measurement
    points = {point.batch_size: point for point in (*before.points, *found.points)}
    measured = {point.batch_size for point in found.points}
    # Sizes are measured in ascending order, so that only a model of another size leaves one out.
    left_out = [size for size in sizes if measured and size < max(measured) and size not in measured]
    failed = next((size for size in sorted(sizes) if size not in measured), 0) if found.error else 0
    # What failed with less memory than there is now, and was tried again, did not fail.
    still = kept.failed_size if kept.failed_size not in points else 0
    failures = [size for size in (failed, still) if size]
    measurement = Measurement(
        signature=before.signature if found.signature.is_empty else found.signature,
        points=tuple(points[size] for size in sorted(points)),
        overhead_bytes=found.overhead_bytes or before.overhead_bytes,
        error=found.error or (before.error if still else ""),
    )
    return Kept(
        measurement=measurement,
        budget_s=max(kept.budget_s, budget_s),
        capacity_bytes=max(kept.capacity_bytes, capacity_bytes),
        failed_size=min(failures, default=0),
        fixed=kept.fixed or bool(left_out) or bool(measured and not measured & set(sizes)),
    )


def selected(kept: Kept, sizes: Sequence[int]) -> Measurement:
    """What is known of these batch sizes; all that is known where it is of none of them (a model of a fixed batch).

    The error is told only where one of them failed.
    """
    found, wanted = kept.measurement, set(sizes)
    points = tuple(point for point in found.points if point.batch_size in wanted) or found.points
    signature = found.signature
    if kept.fixed and len(found.points) == 1:
        # Kept before signatures told it.
        signature = msgspec.structs.replace(signature, fixed_batch=found.points[0].batch_size)
    failed = not found.points or (kept.failed_size and any(size >= kept.failed_size for size in wanted))
    return msgspec.structs.replace(found, signature=signature, points=points, error=found.error if failed else "")


class KeptProfiles:
    """The files below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Kept:
        """What is known; nothing where the file is not there, or cannot be read or believed."""
        return read_kept(self._folder / f"{key}.json", Kept) or Kept()

    def write(self, key: str, kept: Kept) -> None:
        """Keep it.

        Raises OSError.
        """
        keep(self._folder / f"{key}.json", kept)


def key_of(
    source: ModelSource, device_class: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> str:
    """What a profile depends on besides the batch size, as a file name. Precision is the tensors' and the digest's."""
    parts = (source.digest, device_class, execution_versions(), inputs, outputs)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _still_gains(found: Measurement) -> bool:
    """Whether the largest batch measured brought noticeably more than the smaller ones."""
    *smaller, last = sorted(found.points, key=lambda point: point.batch_size)
    return last.rows_per_s > WORTHWHILE_GAIN * max((point.rows_per_s for point in smaller), default=0.0)
