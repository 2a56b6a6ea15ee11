"""Whether a file was replaced: files of a mounted ConfigMap or Secret are, through a symbolic link."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int]


def file_stamp(file: Path) -> Stamp | None:
    """Something that differs when the file was replaced; None where there is none that can be looked at."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
