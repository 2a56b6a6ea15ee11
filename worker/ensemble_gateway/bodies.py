"""Where the body of a request ends that is handed on as it comes: of a known length, or in chunks. Pure."""

from __future__ import annotations

import re
from typing import Protocol

# A chunk's size with its extensions, or a trailer.
MAX_LINE_BYTES = 4096
MAX_TRAILERS = 64

_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


class Unclear(Exception):
    """The bytes are not chunks as RFC 9112 writes them: where they end is for somebody else to say."""


class Body(Protocol):
    """What is left of a request, head and all."""

    done: bool

    def take(self, came: bytes | bytearray) -> int:
        """How many of these bytes belong to the request. Raises Unclear if that is not known."""


class KnownBody:
    """So many bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.done = size == 0

    def take(self, came: bytes | bytearray) -> int:
        """How many of these bytes belong to the request."""
        mine = min(self._left, len(came))
        self._left -= mine
        self.done = not self._left
        return mine


class ChunkedBody:
    """A head of `head_bytes`, then chunks up to an empty one and its trailers (RFC 9112, section 7.1)."""

    def __init__(self, head_bytes: int) -> None:
        self.done = False
        self._skip = head_bytes
        self._line = bytearray()
        self._trailers = -1

    def take(self, came: bytes | bytearray) -> int:
        """How many of these bytes belong to the request. Raises Unclear if that is not known."""
        at, end = 0, len(came)
        while at < end and not self.done:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
            else:
                newline = came.find(b"\n", at)
                step = (end if newline < 0 else newline + 1) - at
                self._line += came[at : at + step]
                if len(self._line) > MAX_LINE_BYTES:
                    raise Unclear
                if newline >= 0:
                    self._take_line()
            at += step
        return at

    def _take_line(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        if not line.endswith(b"\r\n"):
            raise Unclear
        if self._trailers >= 0:
            self.done = line == b"\r\n"
            self._trailers += 1
            if self._trailers > MAX_TRAILERS:
                raise Unclear
            return
        size = line[:-2].partition(b";")[0]
        if not _SIZE.fullmatch(size):
            raise Unclear
        length = int(size, 16)
        if length:
            # And the CR LF behind it.
            self._skip = length + 2
        else:
            self._trailers = 0
