"""The book of profiles: what is known of each version of each member on each class of device. Kept in a ConfigMap.

One entry of the ConfigMap for each version, named by its digest, so that a version that is gone goes alone. What was
measured with other libraries (another torch in the workers' image) is of another program, and counts for nothing. Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from ensemble_operator.profiles.measurements import Measurement, Point, Signature

HASHES_ANNOTATION = "ensemble-operator.io/profile-hashes"
FIRST_RETRY_S = 30.0
LONGEST_RETRY_S = 900.0
MAX_ERROR = 1_000
# Of classes that no worker has now, no more are kept than make so many with the others.
MAX_CLASSES = 8

FoundT = TypeVar("FoundT")


class Tried(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """What may fail and is then tried again.

    `error` says why it failed, `failed_at` (Unix time) when, `failures` how often in a row, `job` in which job last.
    """

    error: str = ""
    failed_at: float = 0.0
    failures: int = 0
    job: str = ""

    @property
    def retry_at(self) -> float:
        """When it is tried again after a failure (Unix time)."""
        return self.failed_at + min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self.failures - 1, 16))


class Known(Tried, frozen=True):
    """What is known of one version on one class. `tried` are the batch sizes that need no further measuring.

    `libraries` are those that it was measured with. `declared` is what the resource said instead, kept for as long as
    the version runs, whatever the resource says then. It has failed where it could not be loaded.
    """

    device_class: str
    libraries: str = ""
    overhead_bytes: int = 0
    signature: Signature | None = None
    points: tuple[Point, ...] = ()
    declared: tuple[Point, ...] = ()
    tried: tuple[int, ...] = ()

    def measurement(self) -> Measurement:
        """The same in planning's words."""
        return Measurement(self.signature or Signature(), self.points, self.overhead_bytes, self.error)


class Sharing(Tried, frozen=True):
    """The co-location factor of a class; 0 while it is not known."""

    factor: float = 0.0


@dataclass(frozen=True, slots=True)
class Book:
    """All that is known, by (digest, device class, libraries).

    `idle` is an idle worker's memory by (class, libraries), once seen kept, `sharing` what members get done that share
    a device. `running` has the libraries of the workers of each class that are there: the first ones are those that
    count, others leave with their pods.
    """

    known: Mapping[tuple[str, str, str], Known] = field(default_factory=dict)
    idle: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sharing: Mapping[tuple[str, str], Sharing] = field(default_factory=dict)
    running: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def libraries_of(self, device_class: str) -> str:
        """The libraries that count on a class; where no worker of it is there, some that it was measured with."""
        if device_class in self.running:
            return self.running[device_class][0]
        return max((libraries for (_, of, libraries) in self.known if of == device_class), default="")

    def of(self, digest: str, device_class: str, libraries: str | None = None) -> Known:
        """What is known of a version on a class, with these libraries or those that count; nothing, if nothing is."""
        chosen = self.libraries_of(device_class) if libraries is None else libraries
        return self.known.get((digest, device_class, chosen)) or Known(device_class, chosen)

    def current(self) -> Iterable[tuple[str, Known]]:
        """What counts, with the digest of the version."""
        counting = {of: self.libraries_of(of) for of in {of for _, of, _ in self.known}}
        return [(digest, known) for (digest, of, libraries), known in self.known.items() if libraries == counting[of]]

    def idle_bytes(self, device_class: str) -> int:
        """An idle worker's memory; 0 if it is not known."""
        return self.idle.get((device_class, self.libraries_of(device_class)), 0)

    def sharing_of(self, device_class: str, libraries: str | None = None) -> Sharing:
        """What is known of sharing a device of a class, with these libraries or those that count."""
        chosen = self.libraries_of(device_class) if libraries is None else libraries
        return self.sharing.get((device_class, chosen)) or Sharing()

    def factors(self) -> dict[str, float]:
        """The co-location factors that are known of classes, with the libraries that count."""
        found = {of: self.sharing_of(of).factor for of, _ in self.sharing}
        return {of: factor for of, factor in found.items() if factor}

    def with_sharing(self, device_class: str, libraries: str, sharing: Sharing) -> Book:
        """The book with what is known of sharing a device of a class."""
        return replace(self, sharing={**self.sharing, (device_class, libraries): sharing})

    def with_known(self, digest: str, known: Known) -> Book:
        """The book with an entry replaced."""
        return replace(self, known={**self.known, (digest, known.device_class, known.libraries): known})

    def with_idle(self, device_class: str, libraries: str, overhead_bytes: int) -> Book:
        """The book with the memory of an idle worker of a class, unless it has it.

        Workers of one class differ by some KiB from start to start: that must not look like another planning problem.
        """
        if (device_class, libraries) in self.idle or overhead_bytes <= 0:
            return self
        return replace(self, idle={**self.idle, (device_class, libraries): overhead_bytes})

    def with_running(self, workers: Iterable[tuple[str, str]]) -> Book:
        """The book as workers use it that have these (device class, libraries)."""
        running: dict[str, tuple[str, ...]] = {}
        for device_class, libraries in workers:
            before = running.get(device_class, ())
            running[device_class] = before if libraries in before else (*before, libraries)
        return replace(self, running=running)

    def only(self, digests: Iterable[str]) -> Book:
        """The book of these versions, without what no worker will ask for.

        That is what was measured with libraries of which nobody is left, once it is known anew, and of classes that
        nobody has those that are too many.
        """
        kept, classes = set(digests), self._kept_classes()
        known = {
            key: found
            for key, found in self.known.items()
            if key[0] in kept and key[1] in classes and not self._is_outdated(*key)
        }
        used = {(of, libraries) for _, of, libraries in known}
        mine = {
            (of, libraries)
            for of, libraries in (*self.idle, *self.sharing)
            if of in classes and (libraries in self.running.get(of, (libraries,)) or (of, libraries) in used)
        }
        idle = {key: found for key, found in self.idle.items() if key in mine}
        sharing = {key: found for key, found in self.sharing.items() if key in mine}
        return replace(self, known=known, idle=idle, sharing=sharing)

    def signature(self, digest: str) -> Signature | None:
        """The inputs and outputs that a version's file tells of, if it was read on any class."""
        return next((k.signature for (d, *_), k in self.known.items() if d == digest and k.signature is not None), None)

    def _kept_classes(self) -> set[str]:
        told = {of for _, of, _ in self.known} | {of for of, _ in (*self.idle, *self.sharing)}
        others = sorted(told - set(self.running))
        return {*self.running, *others[: max(0, MAX_CLASSES - len(self.running))]}

    def _is_outdated(self, digest: str, device_class: str, libraries: str) -> bool:
        running = self.running.get(device_class)
        return running is not None and libraries not in running and (digest, device_class, running[0]) in self.known


_IDLE, _SHARING = "idle", "colocation"


def kept_book(config_map: Mapping[str, Any] | None) -> Book | None:
    """The book in its ConfigMap; None where there is none, or somebody has edited it.

    What others have added is left out. Without hashes it was written by an operator that gave none.
    """
    if config_map is None:
        return None
    data = config_map.get("data") or {}
    told = (config_map["metadata"].get("annotations") or {}).get(HASHES_ANNOTATION)
    if told is None:
        return read_book(data)
    ours = {name: text for name, text in data.items() if f'"{name}":' in told}
    return read_book(ours) if hashes_of(ours) == told else None


def hashes_of(data: Mapping[str, str]) -> str:
    """What the ConfigMap is annotated with: which entries it had when it was written, and the hash of each."""
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in data.items()}
    return msgspec.json.encode(hashes, order="deterministic").decode()


def read_book(data: Mapping[str, str] | None) -> Book:
    """The book in a ConfigMap's data. What somebody has damaged is not known: it is measured again."""
    known: dict[tuple[str, str, str], Known] = {}
    idle: dict[tuple[str, str], int] = {}
    sharing: dict[tuple[str, str], Sharing] = {}
    for name, text in (data or {}).items():
        try:
            if name == _IDLE:
                idle = _flat(msgspec.json.decode(text, type=dict[str, dict[str, int]]))
            elif name == _SHARING:
                sharing = _flat(msgspec.json.decode(text, type=dict[str, dict[str, Sharing]]))
            else:
                found = msgspec.json.decode(text, type=tuple[Known, ...])
                known |= {(name, one.device_class, one.libraries): one for one in found}
        except (msgspec.DecodeError, ValueError):
            continue
    return Book(known, idle, {key: found for key, found in sharing.items() if 0 <= found.factor < math.inf})


def write_book(book: Book) -> dict[str, str]:
    """The data of the ConfigMap."""
    by_digest: dict[str, list[Known]] = {}
    for (digest, *_), known in sorted(book.known.items()):
        by_digest.setdefault(digest, []).append(known)
    data = {digest: msgspec.json.encode(entries).decode() for digest, entries in by_digest.items()}
    if book.idle:
        data[_IDLE] = msgspec.json.encode(_by_class(book.idle)).decode()
    if book.sharing:
        data[_SHARING] = msgspec.json.encode(_by_class(book.sharing)).decode()
    return data


def _by_class(found: Mapping[tuple[str, str], FoundT]) -> dict[str, dict[str, FoundT]]:
    by_class: dict[str, dict[str, FoundT]] = {}
    for (device_class, libraries), one in sorted(found.items(), key=lambda item: item[0]):
        by_class.setdefault(device_class, {})[libraries] = one
    return by_class


def _flat(by_class: Mapping[str, Mapping[str, FoundT]]) -> dict[tuple[str, str], FoundT]:
    return {(of, libraries): one for of, each in by_class.items() for libraries, one in each.items()}
