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

from ensemble_gateway.lent import MAX_HEAD_BYTES
from ensemble_gateway.request import Model, RequestError
from ensemble_gateway.routes import check_content_type
from ensemble_gateway.served import find_model
from ensemble_gateway.v2 import split_body

CACHED_BYTES = 1 << 20
# Text is copied and parsed in memory beside the store; binary tensors are not.
MAX_JSON_BYTES = 16 << 20

_INFER = re.compile(rb"/v2/models/([^/?#]+)(?:/versions/([^/?#]+))?/infer")
# Headers with which an inference is no longer a plain body.
_SLOW = frozenset({b"content-encoding", b"upgrade", b"te", b"trailer", b"expect"})
_VERSIONS = ("1.0", "1.1")


@dataclass(frozen=True, slots=True)
class Head:
    """A parsed head of `length` bytes; `size` counts its body too.

    `fast`: a plain inference, for the edge. `chunked`: its body comes in chunks. `endless`: where its body ends is
    unknown. `refusal`: an HTTP status and a message, for what is no request.
    """

    length: int
    size: int
    fast: bool = False
    endless: bool = False
    chunked: bool = False
    keep_alive: bool = True
    target: bytes = b""
    model: str = ""
    version: str | None = None
    header_length: int | None = None
    refusal: tuple[int, str] | None = None

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

    parser: httptools.HttpRequestParser

    def __init__(self) -> None:
        self.keep_alive = True
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        # Asked here, because it is forgotten when a message without a body is complete.
        self.keep_alive = self.parser.should_keep_alive()


def _parse(text: bytes, max_body_bytes: int) -> Head:
    fields = _Fields()
    parser = fields.parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(text)
        upgrade = False
    except httptools.HttpParserUpgrade:
        upgrade = True
    except httptools.HttpParserError as error:
        return Head(len(text), len(text), refusal=(400, f"this is no HTTP request: {error}"))
    version = parser.get_http_version()
    if version not in _VERSIONS:
        return Head(len(text), len(text), refusal=(505, f"HTTP/{version} is not served: use HTTP/1.1"))
    if upgrade:
        return Head(len(text), len(text), endless=True)
    values = dict(fields.headers)
    expectation = values.get(b"expect", b"100-continue")
    if expectation.lower() != b"100-continue":
        shown = expectation[:80].decode("latin-1")
        return Head(len(text), len(text), refusal=(417, f"Expect {shown!r} is not served: only 100-continue"))
    if b"transfer-encoding" in values:
        return _head_of_chunks(fields, text, version)
    # llhttp has checked that it is a number.
    content_length = int(values.get(b"content-length", b"0"))
    size = len(text) + content_length
    slow = Head(len(text), size)
    match = _INFER.fullmatch(fields.target)
    if match is None or parser.get_method() != b"POST" or version != "1.1":
        return slow
    if _SLOW & values.keys() or content_length > max_body_bytes or b"content-length" not in values:
        return slow
    if values.get(b"accept-encoding", b"").strip().lower() in (b"gzip", b"deflate"):
        # One encoding alone is a wish, as tritonclient states it; the usual list of a client is an offer.
        return slow
    header_length = values.get(b"inference-header-content-length")
    if header_length is not None and not (header_length.isdigit() and len(header_length) < 18):
        return slow
    json_bytes = content_length if header_length is None else min(int(header_length), content_length)
    if json_bytes > MAX_JSON_BYTES:
        message = f"{json_bytes} bytes of JSON are over the limit of {MAX_JSON_BYTES}: send tensors as binary data"
        return Head(len(text), size, refusal=(413, message))
    try:
        check_content_type(values.get(b"content-type", b"").decode("latin-1"))
    except RequestError:
        return slow
    name, wanted = match.groups()
    return Head(
        len(text), size, True, False, False, fields.keep_alive, fields.target,
        unquote(name.decode("latin-1")), None if wanted is None else unquote(wanted.decode("latin-1")),
        None if header_length is None else int(header_length),
    )  # fmt: skip


def _head_of_chunks(fields: _Fields, text: bytes, version: str) -> Head:
    """The head of a body without a length: in plain chunks it tells its end itself."""
    codings = [value for name, value in fields.headers if name == b"transfer-encoding"]
    lengths = any(name == b"content-length" for name, _ in fields.headers)
    plain = len(codings) == 1 and codings[0].strip().lower() == b"chunked" and not lengths and version == "1.1"
    return Head(len(text), len(text), endless=not plain, chunked=plain)


def cannot_become_a_head(text: bytes | bytearray) -> RequestError | None:
    """Why the beginning of a request, without the end of its head, is none; None if it may still become one."""
    if len(text) > MAX_HEAD_BYTES:
        return RequestError(431, f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes")
    if text and not text[:1].isalpha():
        return RequestError(400, "this is no HTTP request: it begins with no method (is it TLS to a plain port?)")
    line = text.find(b"\n")
    if line > 0 and text[line - 1 : line] != b"\r":
        return RequestError(400, "this is no HTTP request: lines must end with CR LF")
    return None
