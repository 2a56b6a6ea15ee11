"""Cuts the answers out of one connection's bytes: HTTP/1.1 and V2 as far as a load needs them. Pure.

Tensors are counted, not kept. Heads seen before, byte for byte, are recognised by a look-up.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TypeVar

MAX_HEAD_BYTES = 65_536
MAX_KNOWN = 256
MAX_KEPT_BYTES = 65_536
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_JSON_LENGTH = re.compile(rb"\r\ninference-header-content-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)

_SeenT = TypeVar("_SeenT")


class NotHttp(Exception):
    """Bytes that are no answer as asked for: the connection's further bytes cannot be understood either."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `error` is what the server says with another status than 200; `closes`: it wants no more."""

    status: int
    missing: bool
    closes: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    length: int
    json_length: int
    closes: bool


class AnswerStream:
    """The answers of one connection, one at a time. `known` heads and headers are shared by many."""

    __slots__ = ("_body", "_head", "_headers", "_heads", "_left", "_pending")

    def __init__(self, known: Known) -> None:
        self._heads, self._headers = known.heads, known.headers
        self._pending = b""
        self._head: _Head | None = None
        self._body = bytearray()
        self._left = 0

    def feed(self, chunk: bytes) -> Answer | None:
        """The answer when `chunk` completes it, else None.

        Raises NotHttp.
        """
        if self._head is None:
            text = self._pending + chunk if self._pending else chunk
            end = text.find(b"\r\n\r\n")
            if end < 0:
                if len(text) > MAX_HEAD_BYTES:
                    raise NotHttp(f"no end of the headers in {MAX_HEAD_BYTES} bytes")
                self._pending = text
                return None
            self._pending = b""
            self._head = self._look_up(text[: end + 4])
            self._left = self._head.length
            chunk = text[end + 4 :]
        return self._take(self._head, chunk)

    def _take(self, head: _Head, chunk: bytes) -> Answer | None:
        wanted = min(head.json_length or head.length, MAX_KEPT_BYTES) - len(self._body)
        if wanted > 0:
            self._body += chunk[:wanted]
        self._left -= len(chunk)
        if self._left < 0:
            raise NotHttp("more bytes than the answer has")
        if self._left:
            return None
        body = bytes(self._body)
        self._body.clear()
        self._head = None
        if head.status != 200:
            return Answer(head.status, False, head.closes, _error(body))
        return Answer(200, self._lacks_members(body[: head.json_length or None]), head.closes)

    def _look_up(self, text: bytes) -> _Head:
        head = self._heads.get(text)
        if head is None:
            head = _parse(text)
            _remember(self._heads, text, head)
        return head

    def _lacks_members(self, header: bytes) -> bool:
        missing = self._headers.get(header)
        if missing is None:
            missing = _lacks_members(header)
            _remember(self._headers, header, missing)
        return missing


class Known:
    """What the connections of one load have seen already."""

    def __init__(self) -> None:
        self.heads: dict[bytes, _Head] = {}
        self.headers: dict[bytes, bool] = {}


def _remember(known: dict[bytes, _SeenT], text: bytes, found: _SeenT) -> None:
    if len(known) >= MAX_KNOWN:
        known.clear()
    known[text] = found


def _parse(text: bytes) -> _Head:
    status, length = _STATUS.match(text), _LENGTH.search(text)
    if status is None:
        raise NotHttp(f"not an answer of HTTP/1.1: {text[:80]!r}")
    if length is None:
        raise NotHttp("an answer without Content-Length")
    json_length = _JSON_LENGTH.search(text)
    return _Head(
        int(status[1]), int(length[1]), int(json_length[1]) if json_length else 0, _CLOSE.search(text) is not None
    )


def _lacks_members(header: bytes) -> bool:
    """Whether the answer's parameters name members that are missing. Anything else than JSON is not ours to judge."""
    try:
        parameters = json.loads(header).get("parameters", {})
        return bool(parameters.get("members_missing"))
    except (ValueError, AttributeError):
        return False


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
