"""Borders within bodies, and their content encodings."""

import gzip
import random
import tracemalloc
import zlib

import pytest

from ensemble_gateway.request import RequestError
from ensemble_gateway.v2 import compress, decompress, split_body

PLAIN = b'{"inputs":[]}' * 100


def status_of(body: bytes, encoding: str, limit: int = 1 << 20) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        decompress(body, encoding, limit)
    return caught.value.status, str(caught.value)


def raw_deflate(plain: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(plain) + stream.flush()


@pytest.mark.parametrize("length", [3, "3", b"3", " 3 ", b"003"])
def test_a_body_is_split_without_copying_its_tensors(length: int | str | bytes) -> None:
    body = bytearray(b"abcdef")
    text, binary = split_body(memoryview(body), length)
    body[5:] = b"!"
    assert (text, bytes(binary)) == (b"abc", b"de!")


def test_the_border_may_be_at_either_end_or_absent() -> None:
    assert [bytes(part) for part in split_body(b"abc", 0)] == [b"", b"abc"]
    assert [bytes(part) for part in split_body(b"abc", 3)] == [b"abc", b""]
    assert [bytes(part) for part in split_body(b"abc", None)] == [b"abc", b""]


@pytest.mark.parametrize("length", [4, -1, "4", "-1", "1.5", "", "x", "0x1", "٣", "1" * 5000, "--1", "-", b"\xff"])
def test_a_border_outside_the_body_or_no_number_is_refused(length: int | str | bytes) -> None:
    with pytest.raises(RequestError) as caught:
        split_body(b"abc", length)
    assert caught.value.status == 400
    assert str(caught.value).startswith("Inference-Header-Content-Length: ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("packed", "encoding"),
    [
        (gzip.compress(PLAIN), "gzip"),
        (gzip.compress(PLAIN), " X-GZIP "),
        (zlib.compress(PLAIN), "deflate"),
        (zlib.compress(PLAIN, 9), "Deflate"),
        (raw_deflate(PLAIN), "deflate"),
        (PLAIN, "identity"),
        (PLAIN, ""),
    ],
)
def test_every_served_encoding_is_undone(packed: bytes, encoding: str) -> None:
    assert decompress(packed, encoding, len(PLAIN)) == PLAIN
    assert decompress(memoryview(packed), encoding, len(PLAIN)) == PLAIN


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_one_byte_over_the_limit_is_refused(encoding: str) -> None:
    packed = {"gzip": gzip.compress(PLAIN), "deflate": zlib.compress(PLAIN), "identity": PLAIN}
    assert status_of(packed[encoding], encoding, len(PLAIN) - 1)[0] == 413


def test_a_bomb_is_refused_in_little_memory() -> None:
    bomb = gzip.compress(bytes(64 << 20), 1)
    tracemalloc.start()
    assert status_of(bomb, "gzip") == (413, "the body is over the limit of 1048576 bytes when decompressed")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("body", "encoding", "status", "fragment"),
    [
        (b"plain", "gzip", 400, "the body is not gzip"),
        (b"", "gzip", 400, "truncated"),
        (b"", "deflate", 400, "truncated"),
        (b"plain", "deflate", 400, "the body is not deflate"),
        (gzip.compress(PLAIN)[:-9], "gzip", 400, "the body's gzip data is truncated"),
        (zlib.compress(PLAIN)[:-1], "deflate", 400, "the body's deflate data is truncated"),
        (gzip.compress(PLAIN) + b"more", "gzip", 400, "the body has 4 bytes after its gzip data"),
        (gzip.compress(PLAIN)[:-8] + bytes(8), "gzip", 400, "the body is not gzip"),
        (PLAIN, "br", 415, "Content-Encoding 'br' is not served: send gzip, deflate or none"),
        (PLAIN, "gzip, deflate", 415, "Content-Encoding 'gzip, deflate' is not served"),
    ],
)
def test_what_is_not_of_its_encoding_is_refused(body: bytes, encoding: str, status: int, fragment: str) -> None:
    found, message = status_of(body, encoding)
    assert found == status
    assert fragment in message


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate, GZIP;q=0.5", "deflate"),
        ("gzip;q=0, deflate;q=0.1", "deflate"),
        ("gzip; q=0", None),
        ("*", "gzip"),
        ("*;q=0.5, gzip;q=0", "deflate"),
        ("identity, gzip;q=0.5", None),
        ("br", None),
        ("gzip;q=x", None),
        ("", None),
    ],
)
def test_the_liked_encoding_is_used(accepted: str, encoding: str | None) -> None:
    packed, used = compress(PLAIN, accepted)
    assert used == encoding
    assert decompress(packed, used or "", len(PLAIN)) == PLAIN
    assert (len(packed) < len(PLAIN)) == (used is not None)


def test_what_would_not_shrink_stays_as_it_is() -> None:
    assert compress(b"small", "gzip") == (b"small", None)
    noise = random.Random(0).randbytes(5000)
    assert compress(noise, "gzip") == (noise, None)
