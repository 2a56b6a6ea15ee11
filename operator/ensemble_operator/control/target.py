"""The plan's ConfigMap: the plan that was pushed last, for pods that start by themselves, and the matrix it leads to.

While a change is under way the first is a step towards the second. A hash tells whether both are as we wrote them:
what somebody has edited is not believed. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from ensemble_contract.errors import InvalidPlan, PlanTooLarge
from ensemble_contract.plan import EnsemblePlan, decode_plan, encode_plan
from ensemble_contract.pod import PLAN_FILE

TARGET_FILE = "target.json"
HASH_ANNOTATION = "ensemble-operator.io/plan-hash"
# A ConfigMap holds 1 MiB, and the plan has its own limit.
MAX_TARGET_BYTES = 120_000


class TargetDevice(msgspec.Struct, frozen=True, rename="camel"):
    """A device as it was planned with: what instances may take there is `usable_bytes`."""

    device_class: str
    kind: str
    capacity_bytes: int
    usable_bytes: int


class Target(msgspec.Struct, frozen=True, rename="camel"):
    """The matrix that is wanted, the question that it answers, and what it promises.

    `examined` is the last question that was asked: its answer was not so much better that it was worth a change.
    `digests` are the members' versions, in order; `rows` has (index in it, batch size) by worker; `classes` lists the
    devices that workers refer to by index, so that a thousand equal ones take little.
    """

    question: str
    examined: str
    digests: tuple[tuple[str, str], ...]
    rows: dict[str, tuple[tuple[int, int], ...]]
    classes: tuple[TargetDevice, ...]
    devices: dict[str, int]
    predicted_rows_per_s: float = 0.0
    bound_rows_per_s: float = 0.0
    why: str = ""

    def device(self, worker: str) -> TargetDevice | None:
        """The device of a worker; None if the matrix has no such row."""
        index = self.devices.get(worker)
        return None if index is None or not 0 <= index < len(self.classes) else self.classes[index]

    def cells(self) -> tuple[tuple[str, str, int], ...]:
        """(worker, member, batch size) of every instance."""
        return tuple((worker, self.digests[index][0], size) for worker, row in self.rows.items() for index, size in row)


@dataclass(frozen=True, slots=True)
class Mirror:
    """What the ConfigMap holds; None for what was never written, or not by us."""

    plan: EnsemblePlan | None = None
    target: Target | None = None


def read_mirror(config_map: Mapping[str, Any] | None) -> Mirror:
    """What is in the ConfigMap."""
    if config_map is None:
        return Mirror()
    data = config_map.get("data") or {}
    annotations = config_map["metadata"].get("annotations") or {}
    if annotations.get(HASH_ANNOTATION) != _hash(data):
        return Mirror()
    try:
        plan = decode_plan(data[PLAN_FILE].encode(), EnsemblePlan) if PLAN_FILE in data else None
        target = msgspec.json.decode(data[TARGET_FILE], type=Target) if TARGET_FILE in data else None
    except (InvalidPlan, msgspec.DecodeError, ValueError):
        return Mirror()
    return Mirror(plan, target)


def write_mirror(plan: EnsemblePlan, target: Target | None) -> tuple[dict[str, str], dict[str, str]]:
    """The ConfigMap's data and annotations.

    Raises PlanTooLarge if they are too large for one.
    """
    data = {PLAN_FILE: encode_plan(plan).decode()}
    if target is not None:
        text = msgspec.json.encode(target).decode()
        if len(text) > MAX_TARGET_BYTES:
            raise PlanTooLarge(f"the matrix has {len(text)} bytes as JSON, over the limit of {MAX_TARGET_BYTES}")
        data[TARGET_FILE] = text
    return data, {HASH_ANNOTATION: _hash(data)}


def _hash(data: Mapping[str, str]) -> str:
    text = "\0".join(data.get(name, "") for name in (PLAN_FILE, TARGET_FILE))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
