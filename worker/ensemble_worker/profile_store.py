"""What measuring has found out, kept in a folder so that no worker measures anything twice.

A file for each model digest, class of device and version of the libraries that run it, and one for the class's
co-location factor. Files are only ever replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ensemble_contract.libraries import execution_versions
from ensemble_contract.plan import ModelSource
from ensemble_worker.colocation import Factor

_LOG = logging.getLogger(__name__)

# What ran out of memory is tried again with so many times as much: what is spare beside what serves varies.
MORE_MEMORY = 1.25

KeptT = TypeVar("KeptT", bound=msgspec.Struct)


class Point(msgspec.Struct, frozen=True, rename="camel"):
    """One batch size: `memory_bytes` is what the instance adds to an idle worker, `spread` as in `Measurement`."""

    batch_size: int
    rows_per_s: float
    latency_s: float
    memory_bytes: int
    spread: float = 0.0
    form: str = ""


class Found(msgspec.Struct, frozen=True, rename="camel"):
    """What is known of a model on a class of device. `signature` is what the model file tells of its tensors.

    `failed_size` is the smallest batch size for which memory did not suffice (0: none), `failed_bytes` how much a
    measuring process could take then (None: all there was), `error` what it said.
    """

    signature: dict[str, Any] | None = None
    overhead_bytes: int = 0
    points: tuple[Point, ...] = ()
    failed_size: int = 0
    failed_bytes: int | None = None
    error: str = ""

    def with_point(self, point: Point) -> Found:
        """The same, and one batch size more; ascending."""
        points = [point, *(one for one in self.points if one.batch_size != point.batch_size)]
        found = msgspec.structs.replace(self, points=tuple(sorted(points, key=lambda one: one.batch_size)))
        if not 0 < self.failed_size <= point.batch_size:
            return found
        return msgspec.structs.replace(found, failed_size=0, failed_bytes=None, error="")

    def with_failure(self, size: int, memory_bytes: int | None, error: str) -> Found:
        """The same, and a batch size that so much memory does not suffice for."""
        return msgspec.structs.replace(self, failed_size=size, failed_bytes=memory_bytes, error=error)

    def before(self, size: int) -> Point | None:
        """The largest batch size below this one."""
        smaller = [point for point in self.points if point.batch_size < size]
        return smaller[-1] if smaller else None

    def is_too_large(self, size: int, memory_bytes: int | None) -> bool:
        """Whether a batch size has run out of memory, and there is not noticeably more of it now."""
        if not 0 < self.failed_size <= size:
            return False
        return memory_bytes is None or self.failed_bytes is None or memory_bytes < MORE_MEMORY * self.failed_bytes

    def missing(self, sizes: tuple[int, ...], memory_bytes: int | None = None) -> tuple[int, ...]:
        """The batch sizes that are still to be measured, ascending; a model of one fixed batch has no other.

        `memory_bytes` is what measuring may take; None for all there is.
        """
        known = {point.batch_size for point in self.points}
        if known and (self.signature or {}).get("fixedBatch") in known:
            return ()
        return tuple(size for size in sorted(set(sizes) - known) if not self.is_too_large(size, memory_bytes))


class ProfileStore:
    """Results by model, in memory and, with a folder, on disk."""

    def __init__(self, folder: Path | None, device_class: str) -> None:
        self._folder = folder
        self._device_class = device_class
        self._known: dict[str, Found] = {}
        self._factor = Factor()

    def recall(self, source: ModelSource) -> Found:
        """What is known; what is on disk but cannot be believed is measured again."""
        key = self._key(source.digest, source.format)
        if key not in self._known:
            self._known[key] = self._read(key, Found) or Found()
        return self._known[key]

    def keep(self, source: ModelSource, found: Found) -> None:
        """Remember it. A folder that cannot be written costs another measurement after a restart, and no more."""
        key = self._key(source.digest, source.format)
        self._known[key] = found
        self._write(key, found)

    def recall_factor(self) -> Factor:
        """The class's co-location factor; 0 if it is not known."""
        if not self._factor.factor:
            self._factor = self._read(self._key("co-location"), Factor) or Factor()
        return self._factor

    def keep_factor(self, factor: Factor) -> None:
        """Remember the class's co-location factor, as `keep` does."""
        self._factor = factor
        self._write(self._key("co-location"), factor)

    def _read(self, key: str, kind: type[KeptT]) -> KeptT | None:
        if self._folder is None:
            return None
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self._folder / f"{key}.json").read_bytes(), type=kind)
        return None

    def _write(self, key: str, kept: msgspec.Struct) -> None:
        if self._folder is None:
            return
        draft = self._folder / f"{key}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(kept))
            draft.replace(self._folder / f"{key}.json")
        except OSError as error:
            _LOG.warning("profiles are not kept for a restart: %s", error)

    def _key(self, *what: str) -> str:
        return hashlib.sha256(msgspec.json.encode((*what, self._device_class, execution_versions()))).hexdigest()
