"""Request heads: which requests the edge reads itself, parsed once for all heads of the same bytes.

A client sends the same head again and again, so a look-up by its bytes replaces the parser. Both caches are bounded in
bytes; when one is full it starts anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

import httptools

from ensemble_gateway.request import Model, RequestError
from ensemble_gateway.routes import check_content_type
from ensemble_gateway.served import find_model
from ensemble_gateway.v2 import split_body

CACHED_BYTES = 1 << 20

_INFER = re.compile(rb"/v2/models/([^/?#]+)(?:/versions/([^/?#]+))?/infer")
# Headers with which a request is no longer a plain body of known length.
_SLOW = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer"})


@dataclass(frozen=True, slots=True)
class Head:
    """A parsed head of `length` bytes. `fast`: a plain inference, for the edge; `endless`: where its body ends is unknown.

    `size` counts head and body in bytes.
    """

    length: int
    size: int
    fast: bool = False
    endless: bool = False
    keep_alive: bool = True
    target: bytes = b""
    model: str = ""
    version: str | None = None
    header_length: int | None = None

    def model_of(self, models: Mapping[str, Model]) -> Model:
        """The model that is asked.

        Raises RequestError (404) if it is not served.
        """
        return find_model(dict(models), self.model, self.version)

    def split(self, body: memoryview) -> tuple[bytes, memoryview]:
        """The JSON part and the binary part of the body.

        Raises RequestError (400) if the header length is beyond the body.
        """
        return split_body(body, self.header_length)


class Heads:
    """Parsed heads by their bytes."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._known: dict[bytes, Head] = {}
        self._bytes = 0

    def parse(self, text: bytes) -> Head:
        """The head in `text`, which ends with an empty line."""
        head = self._known.get(text)
        if head is None:
            head = _parse(text, self._max_body_bytes)
            self._bytes += len(text)
            if self._bytes > CACHED_BYTES:
                self._known.clear()
                self._bytes = len(text)
            self._known[text] = head
        return head


class _Fields:
    """What httptools tells of a head."""

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True


def _parse(text: bytes, max_body_bytes: int) -> Head:
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(text)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return Head(len(text), len(text), endless=True)
    values = dict(fields.headers)
    names = [name for name, _ in fields.headers]
    if not fields.complete or b"transfer-encoding" in values or names.count(b"content-length") > 1:
        return Head(len(text), len(text), endless=True)
    # llhttp has checked that it is a number.
    content_length = int(values.get(b"content-length", b"0"))
    size = len(text) + content_length
    slow = Head(len(text), size)
    match = _INFER.fullmatch(fields.target)
    if match is None or parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
        return slow
    if _SLOW & values.keys() or content_length > max_body_bytes or b"content-length" not in values:
        return slow
    if values.get(b"accept-encoding", b"").strip().lower() in (b"gzip", b"deflate"):
        # One encoding alone is a wish, as tritonclient states it; the usual list of a client is an offer.
        return slow
    header_length = values.get(b"inference-header-content-length")
    if header_length is not None and not (header_length.isdigit() and len(header_length) < 18):
        return slow
    try:
        check_content_type(values.get(b"content-type", b"").decode("latin-1"))
    except RequestError:
        return slow
    name, version = match.groups()
    return Head(
        len(text), size, True, False, bool(parser.should_keep_alive()), fields.target,
        unquote(name.decode("latin-1")), None if version is None else unquote(version.decode("latin-1")),
        None if header_length is None else int(header_length),
    )  # fmt: skip
