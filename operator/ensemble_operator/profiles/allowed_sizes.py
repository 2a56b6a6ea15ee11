"""Which of the batch sizes that were profiled a spec lets a plan use. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.profiles.measurements import Measurement


def within(found: Measurement, sizes: Sequence[int]) -> Measurement:
    """The measurement at the spec's batch sizes; at its own for a model that takes no other."""
    fixed = found.signature.fixed_batch
    points = tuple(p for p in found.points if p.batch_size in sizes or p.batch_size == fixed)
    return msgspec.structs.replace(found, points=points)


def all_within(
    measured: Mapping[tuple[str, str], Measurement], sizes: Sequence[int]
) -> dict[tuple[str, str], Measurement]:
    """All measurements, by (member, device class), at the spec's batch sizes.

    Raises InvalidProblem for members that are profiled, but at none of these.
    """
    allowed = {key: within(found, sizes) for key, found in measured.items()}
    able = {member for (member, _), found in allowed.items() if found.points}
    profiled: dict[str, set[int]] = {}
    for (member, _), found in measured.items():
        if member not in able and found.points:
            profiled.setdefault(member, set()).update(p.batch_size for p in found.points)
    if profiled:
        raise InvalidProblem(
            [
                f"member {member!r} is profiled at batch sizes {_listed(known)}, none of which is in the spec's "
                f"batching.sizes ({_listed(sizes)}): list one of them, or profile it at one that is listed"
                for member, known in profiled.items()
            ]
        )
    return allowed


def _listed(sizes: Sequence[int] | set[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
