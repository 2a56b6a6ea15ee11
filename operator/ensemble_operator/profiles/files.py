"""What was measured, as files below a cache folder: written in one step, and what cannot be believed is not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

StructT = TypeVar("StructT", bound=msgspec.Struct)


def read_kept(path: Path, kind: type[StructT]) -> StructT | None:
    """What the file says; None where it is not there, or cannot be read or believed."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    return None


def keep(path: Path, measured: msgspec.Struct) -> None:
    """Keep it, whole or not at all.

    Raises OSError.
    """
    partial = path.with_suffix(f".{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(msgspec.json.encode(measured))
    partial.replace(path)
