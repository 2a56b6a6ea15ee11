"""Whether a child must be applied: it is missing, is wanted otherwise than it was applied, or was changed by others.

What the API server adds to an object (defaults, ids, counters) and what users add (labels, annotations) is no drift.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

Manifest = Mapping[str, Any]

_CONTENT = ("spec", "data", "binaryData", "automountServiceAccountToken", "type")


@dataclass(frozen=True, slots=True)
class _Applied:
    """What was applied, and what the object looked like then."""

    wanted: str
    seen: str


class Applied:
    """What this process has applied of one ensemble. Forgotten when it ends: a new one applies each object once."""

    def __init__(self) -> None:
        self._applied: dict[tuple[str, str], _Applied] = {}

    def is_settled(self, manifest: Manifest, live: Manifest | None) -> bool:
        """Whether the object is as it was applied, and that is as it is wanted now."""
        before = self._applied.get(_name(manifest))
        if live is None or before is None or before.wanted != _hash(manifest):
            return False
        return before.seen == fingerprint(manifest, live)

    def note(self, manifest: Manifest, answer: Manifest) -> None:
        """Remember what the API server answered when the manifest was applied."""
        self._applied[_name(manifest)] = _Applied(_hash(manifest), fingerprint(manifest, answer))


def fingerprint(manifest: Manifest, live: Manifest) -> str:
    """What an object holds now, of all that its owner decides and of the labels and annotations that are ours."""
    ours, metadata = manifest["metadata"], live["metadata"]
    parts: dict[str, Any] = {field: live.get(field) for field in _CONTENT}
    parts["uid"] = metadata.get("uid")
    for field in ("labels", "annotations"):
        found = metadata.get(field) or {}
        parts[field] = {key: found.get(key) for key in sorted(ours.get(field) or {})}
    parts["owners"] = sorted(str(owner.get("uid")) for owner in metadata.get("ownerReferences") or ())
    return _hash(parts)


def _name(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _hash(content: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()
