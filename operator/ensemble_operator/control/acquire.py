"""How many pods each pool shall have, and when an ensemble gives up waiting for devices. Pure.

The StatefulSet's annotations carry what must outlive the operator: since when an ensemble waits, and after it gave its
devices back, when it tries again. Two ensembles that each hold half of what they need both give back, and try again at
different times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_operator.control.times import rfc3339, unix_time

WAITING_SINCE = "ensemble-operator.io/waiting-since"
RETRY_AT = "ensemble-operator.io/retry-at"
ATTEMPTS = "ensemble-operator.io/acquire-attempts"
GENERATION = "ensemble-operator.io/acquire-generation"
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 1_800.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Since when (Unix time) an ensemble waits for devices, or until when it has given them back; None: neither.

    `generation` is that of the resource which they were given back under; 0 if it is not known.
    """

    waiting_since: float | None = None
    retry_at: float | None = None
    attempts: int = 0
    generation: int = 0

    @staticmethod
    def read(annotations: Mapping[str, str]) -> Patience:
        """From the annotations of its StatefulSet."""
        return Patience(
            unix_time(annotations.get(WAITING_SINCE)) or None,
            unix_time(annotations.get(RETRY_AT)) or None,
            _number(annotations.get(ATTEMPTS, "")),
            _number(annotations.get(GENERATION, "")),
        )

    def annotations(self) -> dict[str, str]:
        """For its StatefulSet."""
        found = {}
        if self.waiting_since is not None:
            found[WAITING_SINCE] = rfc3339(self.waiting_since)
        if self.retry_at is not None:
            found[RETRY_AT] = rfc3339(self.retry_at)
        if self.attempts:
            found[ATTEMPTS] = str(self.attempts)
        if self.generation:
            found[GENERATION] = str(self.generation)
        return found


@dataclass(frozen=True, slots=True)
class Waiting:
    """What an ensemble waits for: `fits` if it has a plan on what it holds, `lacking` if it holds too few devices.

    Neither: it has devices enough to go on, and is busy with them.
    """

    fits: bool
    lacking: bool


def patience(before: Patience, waiting: Waiting, timeout_s: float, now: float, seed: str, generation: int) -> Patience:
    """What becomes of an ensemble's patience. `retry_at` in the future means: hold nothing until then.

    `generation` is the resource's: who has corrected it need not wait.
    """
    if waiting.fits:
        return Patience()
    if before.retry_at is not None:
        if before.generation not in (0, generation):
            return Patience(waiting_since=now)
        return before if now < before.retry_at else Patience(waiting_since=now, attempts=before.attempts)
    if not waiting.lacking:
        return Patience(attempts=before.attempts)
    since = now if before.waiting_since is None else before.waiting_since
    if now - since <= timeout_s:
        return Patience(since, attempts=before.attempts)
    retry_at = now + pause_s(before.attempts, seed, min(FIRST_PAUSE_S, timeout_s))
    return Patience(retry_at=retry_at, attempts=before.attempts + 1, generation=generation)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def pause_s(attempts: int, seed: str, first_s: float = FIRST_PAUSE_S) -> float:
    """How long devices are given back: doubling, and different for each ensemble by a factor of 0.5 to 1.5."""
    draw = int.from_bytes(hashlib.sha256(f"{seed} {attempts}".encode()).digest()[:4], "big") / 2**32
    return min(LONGEST_PAUSE_S, first_s * 2.0 ** min(attempts, 16)) * (0.5 + draw)


def replicas(wanted: int, present: int | None, highest_in_use: int, *, released: bool) -> int:
    """The replicas of a pool: those wanted at once; fewer only when nothing runs on those that go.

    `present` is what the StatefulSet has now (None: there is none), `highest_in_use` the highest ordinal that a plan
    still uses (-1: none).
    """
    if released:
        return 0
    if present is None or wanted >= present:
        return wanted
    return max(wanted, min(present, highest_in_use + 1))
