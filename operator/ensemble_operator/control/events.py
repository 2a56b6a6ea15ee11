"""Kubernetes Events (events.k8s.io/v1): what is written, and which one is only the last one again. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from ensemble_operator.control.kinds import EVENT, FIELD_MANAGER, Manifest
from ensemble_operator.control.times import micro_time

# As the API validates them.
MAX_NOTE_BYTES = 1_024
MAX_REASON = 128
# An event's time to live in a cluster is an hour by default; a series is closed sooner.
SERIES_S = 360.0
MAX_REMEMBERED = 2_000


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling about an object."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    type: str
    reason: str
    note: str
    action: str

    @staticmethod
    def about(regarding: Manifest, type: str, reason: str, note: str, action: str) -> Happening:  # noqa: A002
        """From the manifest of the object that it is about. A long note is cut."""
        metadata = regarding["metadata"]
        return Happening(
            api_version=regarding["apiVersion"],
            kind=regarding["kind"],
            namespace=metadata.get("namespace") or "default",
            name=metadata["name"],
            uid=metadata.get("uid", ""),
            type=type,
            reason=reason[:MAX_REASON],
            note=_cut(note),
            action=action[:MAX_REASON],
        )


class EventMemory:
    """What was told lately, so that the same again becomes a count on it."""

    def __init__(self, reporter: str) -> None:
        self._reporter = reporter
        # Happening -> its event's name, when it was told last, how often.
        self._told: OrderedDict[Happening, tuple[str, float, int]] = OrderedDict()

    def again(self, happening: Happening, now: float) -> tuple[str, Manifest] | None:
        """The event's name and the patch that counts it up, if it was told lately."""
        name, last, count = self._told.get(happening, ("", 0.0, 0))
        if not count or now - last > SERIES_S:
            return None
        self._told[happening] = (name, now, count + 1)
        return name, {"series": {"count": count + 1, "lastObservedTime": micro_time(now)}}

    def first(self, happening: Happening, now: float) -> Manifest:
        """The manifest of a new event."""
        digest = hashlib.sha256(repr((happening, now)).encode()).hexdigest()[:16]
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": f"{happening.name[:200]}.{digest}", "namespace": happening.namespace},
            "eventTime": micro_time(now),
            "reportingController": FIELD_MANAGER,
            "reportingInstance": self._reporter[:MAX_REASON],
            "action": happening.action,
            "reason": happening.reason,
            "type": happening.type,
            "note": happening.note,
            "regarding": {
                "apiVersion": happening.api_version,
                "kind": happening.kind,
                "namespace": happening.namespace,
                "name": happening.name,
                "uid": happening.uid,
            },
        }

    def remember(self, happening: Happening, name: str, now: float) -> None:
        """The event was written."""
        self._told[happening] = (name, now, 1)
        self._told.move_to_end(happening)
        while len(self._told) > MAX_REMEMBERED:
            self._told.popitem(last=False)

    def forget(self, happening: Happening) -> None:
        """The event is gone from the cluster."""
        self._told.pop(happening, None)


def _cut(note: str) -> str:
    text = note.encode()
    return note if len(text) <= MAX_NOTE_BYTES else text[: MAX_NOTE_BYTES - 3].decode(errors="ignore") + "…"
