"""The private folder of one `ensemble serve`: sockets, plans and keys; gone when it ends.

A runner that was killed leaves its folder behind; the next one removes it. A lock on the folder, which the kernel
releases with its holder, tells the living from the dead where a process id could not (it may be used again, or be of
another PID namespace that shares the folder above).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "ensemble-serve-"
# The kernel's limit for a Unix socket's path is 107 bytes; the longest name in the folder is a worker's.
MAX_BASE_BYTES = 46
# Between making a folder and locking it, it looks like one left behind.
YOUNG_S = 60.0


@contextmanager
def runtime_folder(wanted: str | None) -> Iterator[Path]:
    """A new folder that only this user may enter, locked while in use, and removed at the end.

    It lies in `wanted` ($XDG_RUNTIME_DIR) if that can be used and is short enough for socket paths, else in the
    temporary folder. Raises OSError if none can be made.
    """
    base = _base(wanted)
    _sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _base(wanted: str | None) -> Path:
    for candidate in (wanted, tempfile.gettempdir()):
        short = candidate and len(os.fsencode(candidate)) <= MAX_BASE_BYTES
        if candidate and short and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return Path("/tmp")  # noqa: S108 - the folder inside is made by mkdtemp, mode 0700


def _sweep(base: Path) -> None:
    """Remove the folders of this user's runners that are gone."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            state = folder.lstat()
            if state.st_uid != os.getuid() or time.time() - state.st_mtime < YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
