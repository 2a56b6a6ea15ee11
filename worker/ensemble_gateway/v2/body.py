"""Bodies before and after their meaning: the border between JSON and binary tensors, and content encodings."""

from __future__ import annotations

import zlib

from ensemble_gateway.request import RequestError

MIN_COMPRESSED_BYTES = 512
"""Smaller answers cost more to compress than to send."""

_LEVEL = 1
_GZIP_BITS = 16 + zlib.MAX_WBITS
_RAW_BITS = -zlib.MAX_WBITS


def split_body(
    body: bytes | bytearray | memoryview, header_length: int | str | bytes | None
) -> tuple[bytes, memoryview]:
    """The JSON text of a body and, without a copy, its binary part.

    `header_length` is the value of `Inference-Header-Content-Length`; without one the whole body is JSON.

    Raises RequestError (400) if it is not a number within the body.
    """
    view = memoryview(body)
    if header_length is None:
        return bytes(body), view[:0]
    length = header_length if isinstance(header_length, int) else _length(header_length)
    if not 0 <= length <= len(view):
        raise RequestError(
            400, f"Inference-Header-Content-Length: {length} is not within the body, which has {len(view)} bytes"
        )
    return bytes(view[:length]), view[length:]


def decompress(body: bytes | memoryview, encoding: str, limit: int) -> bytes:
    """The body sent with this `Content-Encoding`: gzip or deflate (zlib's form or raw), of at most `limit` bytes.

    Raises RequestError: 400 for bytes that are not of the encoding, 413 over the limit, 415 for another encoding.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        if len(body) > limit:
            raise RequestError(413, f"the body is over the limit of {limit} bytes")
        return bytes(body)
    if name in ("gzip", "x-gzip"):
        bits = _GZIP_BITS
    elif name == "deflate":
        bits = zlib.MAX_WBITS if _is_zlib(body) else _RAW_BITS
    else:
        raise RequestError(415, f"Content-Encoding {encoding[:80]!r} is not served: send gzip, deflate or none")
    stream = zlib.decompressobj(bits)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not {name}: {error}") from None
    if len(plain) > limit:
        raise RequestError(413, f"the body is over the limit of {limit} bytes when decompressed")
    if not stream.eof:
        raise RequestError(400, f"the body's {name} data is truncated")
    if stream.unused_data:
        raise RequestError(400, f"the body has {len(stream.unused_data)} bytes after its {name} data")
    return plain


def compress(body: bytes, accept_encoding: str) -> tuple[bytes, str | None]:
    """The body in the encoding that `Accept-Encoding` likes best, and that encoding's name: gzip, deflate or None.

    RFC 9110, section 12.5.3. Small bodies, and bodies that would not shrink, stay as they are.
    """
    encoding = _preferred(accept_encoding) if len(body) >= MIN_COMPRESSED_BYTES else None
    if encoding is None:
        return body, None
    stream = zlib.compressobj(_LEVEL, wbits=_GZIP_BITS if encoding == "gzip" else zlib.MAX_WBITS)
    packed = stream.compress(body) + stream.flush()
    return (packed, encoding) if len(packed) < len(body) else (body, None)


def _length(text: str | bytes) -> int:
    digits = text.decode("latin-1") if isinstance(text, bytes) else text
    digits = digits.strip()
    sign, number = (-1, digits[1:]) if digits.startswith("-") else (1, digits)
    if not (number.isascii() and number.isdecimal() and len(number) <= 18):
        raise RequestError(400, f"Inference-Header-Content-Length: {digits[:40]!r} is not a number of bytes")
    return sign * int(number)


def _is_zlib(body: bytes | memoryview) -> bool:
    """Whether a body starts as zlib's form does (RFC 1950, section 2.2) rather than with a raw deflate block."""
    return len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0


def _preferred(accept_encoding: str) -> str | None:
    """The one of gzip and deflate with the highest weight above 0; gzip among equals."""
    weights: dict[str, float] = {}
    for choice in accept_encoding.lower().split(","):
        name, _, parameter = choice.strip().partition(";")
        weights[name.strip()] = _weight(parameter)
    others = weights.get("*", 0.0)
    gzip = weights.get("gzip", weights.get("x-gzip", others))
    deflate = weights.get("deflate", others)
    if max(gzip, deflate) <= 0 or weights.get("identity", 0.0) > max(gzip, deflate):
        return None
    return "gzip" if gzip >= deflate else "deflate"


def _weight(parameter: str) -> float:
    name, _, value = parameter.partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0
