"""Memory that gateway and worker share, and the places for results in it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os


class SharedMemory:
    """Anonymous memory with a file descriptor that can be passed to another process."""

    def __init__(self, name: str, size: int) -> None:
        with contextlib.ExitStack() as undo:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, self.fd)
            os.ftruncate(self.fd, size)
            # Whoever maps it relies on this: to read behind a file's end is a SIGBUS.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            # It keeps a descriptor of its own.
            self._map = mmap.mmap(self.fd, size)
            undo.pop_all()
        self.memory = memoryview(self._map)

    def close(self) -> None:
        """Drop it here; it is gone when the last process has let go of it."""
        os.close(self.fd)


class Arena:
    """Places for results: blocks of powers of two, used again last in, first out, so that few pages are touched."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = 0
        self._free: dict[int, list[int]] = {}

    def take(self, size: int) -> int | None:
        """The offset of a block of at least `size` bytes; None while the arena is used up."""
        block = 1 << max(12, (size - 1).bit_length())
        free = self._free.get(block)
        if free:
            return free.pop()
        if self._next + block > self._size:
            return None
        at = self._next
        self._next += block
        return at

    def give(self, offset: int, size: int) -> None:
        """Free a block."""
        self._free.setdefault(1 << max(12, (size - 1).bit_length()), []).append(offset)
