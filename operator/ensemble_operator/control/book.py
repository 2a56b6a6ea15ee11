"""The book of profiles: what is known of each version of each member on each class of device. Kept in a ConfigMap.

One entry of the ConfigMap for each version, named by its digest, so that a version that is gone goes alone. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from ensemble_operator.profiles.measurements import Measurement, Point, Signature

FIRST_RETRY_S = 30.0
LONGEST_RETRY_S = 900.0
MAX_ERROR = 1_000


class Known(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is known of one version on one class. `tried` are the batch sizes that need no further measuring.

    `declared` is what the resource said instead, kept for as long as the version runs, whatever the resource says then.
    `error` says why it could not be loaded, `failed_at` (Unix time) when, `failures` how often in a row, and `job` in
    which job the last time.
    """

    device_class: str
    overhead_bytes: int = 0
    signature: Signature | None = None
    points: tuple[Point, ...] = ()
    declared: tuple[Point, ...] = ()
    tried: tuple[int, ...] = ()
    error: str = ""
    failed_at: float = 0.0
    failures: int = 0
    job: str = ""

    @property
    def retry_at(self) -> float:
        """When a version that could not be loaded is tried again (Unix time)."""
        return self.failed_at + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 16))

    def measurement(self) -> Measurement:
        """The same in planning's words."""
        return Measurement(self.signature or Signature(), self.points, self.overhead_bytes, self.error)


@dataclass(frozen=True, slots=True)
class Book:
    """All that is known, by (digest, device class). `idle` is an idle worker's memory by class, once seen kept."""

    known: Mapping[tuple[str, str], Known] = field(default_factory=dict)
    idle: Mapping[str, int] = field(default_factory=dict)

    def of(self, digest: str, device_class: str) -> Known:
        """What is known of a version on a class; nothing, if nothing is."""
        return self.known.get((digest, device_class)) or Known(device_class)

    def with_known(self, digest: str, known: Known) -> Book:
        """The book with an entry replaced."""
        return Book({**self.known, (digest, known.device_class): known}, self.idle)

    def with_idle(self, device_class: str, overhead_bytes: int) -> Book:
        """The book with the memory of an idle worker of a class, unless it has it.

        Workers of one class differ by some KiB from start to start: that must not look like another planning problem.
        """
        if device_class in self.idle or overhead_bytes <= 0:
            return self
        return Book(self.known, {**self.idle, device_class: overhead_bytes})

    def only(self, digests: Iterable[str]) -> Book:
        """The book without versions that are gone."""
        kept = set(digests)
        return Book({key: known for key, known in self.known.items() if key[0] in kept}, self.idle)

    def signature(self, digest: str) -> Signature | None:
        """The inputs and outputs that a version's file tells of, if it was read on any class."""
        return next((k.signature for (d, _), k in self.known.items() if d == digest and k.signature is not None), None)


_IDLE = "idle"


def read_book(data: Mapping[str, str] | None) -> Book:
    """The book in a ConfigMap's data. What somebody has damaged is not known: it is measured again."""
    known: dict[tuple[str, str], Known] = {}
    idle: dict[str, int] = {}
    for name, text in (data or {}).items():
        try:
            if name == _IDLE:
                idle = msgspec.json.decode(text, type=dict[str, int])
            else:
                found = msgspec.json.decode(text, type=tuple[Known, ...])
                known |= {(name, one.device_class): one for one in found}
        except (msgspec.DecodeError, ValueError):
            continue
    return Book(known, idle)


def write_book(book: Book) -> dict[str, str]:
    """The data of the ConfigMap."""
    by_digest: dict[str, list[Known]] = {}
    for (digest, _), known in sorted(book.known.items()):
        by_digest.setdefault(digest, []).append(known)
    data = {digest: msgspec.json.encode(entries).decode() for digest, entries in by_digest.items()}
    if book.idle:
        data[_IDLE] = msgspec.json.encode(dict(sorted(book.idle.items()))).decode()
    return data
