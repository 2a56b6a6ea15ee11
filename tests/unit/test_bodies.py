"""Where bodies end that are handed on as they come."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_gateway.bodies import MAX_LINE_BYTES, MAX_TRAILERS, Body, ChunkedBody, KnownBody, Unclear

HEAD = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


def taken(body: Body, text: bytes, cuts: list[int]) -> int:
    """How many bytes a body takes of a text that comes in pieces."""
    total = 0
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        total += body.take(text[start:end])
    return total


def cuts_of(data: st.DataObject, text: bytes) -> list[int]:
    return sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))


@given(st.data(), st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.binary(max_size=20))
def test_chunks_end_where_they_end_however_they_come(data: st.DataObject, chunks: list[bytes], behind: bytes) -> None:
    extension = data.draw(st.sampled_from([b"", b";a=b", b' ; name="value"'.lstrip()]))
    trailers = data.draw(st.sampled_from([b"", b"Digest: x\r\n", b"A: 1\r\nB: 2\r\n"]))
    written = b"".join(b"%X%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    request = HEAD + written + b"0\r\n" + trailers + b"\r\n"
    body = ChunkedBody(len(HEAD))
    assert taken(body, request + behind, cuts_of(data, request + behind)) == len(request)
    assert body.done


@given(st.data(), st.integers(0, 60), st.binary(max_size=20))
def test_a_known_length_ends_there(data: st.DataObject, size: int, behind: bytes) -> None:
    text = bytes(size) + behind
    body = KnownBody(size)
    assert taken(body, text, cuts_of(data, text)) == size
    assert body.done


def test_what_is_not_all_there_is_not_done() -> None:
    body = ChunkedBody(len(HEAD))
    body.take(HEAD + b"3\r\nabc\r\n0\r\n")
    assert not body.done
    body.take(b"\r\n")
    assert body.done


@pytest.mark.parametrize(
    "chunks",
    [
        b"xyz\r\n",
        b"\r\n",
        b"-1\r\n",
        b"3\nabc\n",
        b"0x3\r\nabc\r\n",
        b"f" * 16 + b"\r\n",
        b"1" * (MAX_LINE_BYTES + 1),
        b"0\r\n" + b"A: 1\r\n" * (MAX_TRAILERS + 2),
    ],
    ids=lambda chunks: re.sub(r"\W+", " ", chunks.decode())[:12],
)
def test_what_is_no_chunk_is_unclear(chunks: bytes) -> None:
    with pytest.raises(Unclear):
        ChunkedBody(len(HEAD)).take(HEAD + chunks)
