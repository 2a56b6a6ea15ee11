"""Which heads the edge reads itself, and what the others are."""

import pytest

from ensemble_gateway.heads import CACHED_BYTES, MAX_JSON_BYTES, Head, Heads, cannot_become_a_head
from ensemble_gateway.lent import MAX_HEAD_BYTES

MAX_BODY_BYTES = 1000
TARGET = "/v2/models/m/infer"


def head_text(*headers: str, method: str = "POST", target: str = TARGET, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/{version}", *headers, "", ""]).encode("latin-1")


def parse(text: bytes) -> Head:
    return Heads(MAX_BODY_BYTES).parse(text)


def test_a_plain_inference_is_the_edges() -> None:
    text = head_text("Content-Length: 70", "Inference-Header-Content-Length: 30", "Content-Type: application/json")
    head = parse(text)
    assert head == Head(
        len(text), len(text) + 70, fast=True, target=TARGET.encode(), model="m", header_length=30, keep_alive=True
    )


@pytest.mark.parametrize(
    ("target", "model", "version"),
    [
        ("/v2/models/a.b/versions/12/infer", "a.b", "12"),
        ("/v2/models/a%2Fb%20c/infer", "a/b c", None),
        ("/v2/models/%C3%A9/infer", "é", None),
    ],
)
def test_model_and_version(target: str, model: str, version: str | None) -> None:
    head = parse(head_text("Content-Length: 0", target=target))
    assert (head.fast, head.model, head.version) == (True, model, version)


@pytest.mark.parametrize(
    ("headers", "keep_alive"), [([], True), (["Connection: close"], False), (["Connection: Keep-Alive"], True)]
)
def test_keep_alive(headers: list[str], keep_alive: bool) -> None:
    assert parse(head_text("Content-Length: 0", *headers)).keep_alive == keep_alive


@pytest.mark.parametrize(
    "text",
    [
        head_text("Content-Length: 5", method="PUT"),
        head_text("Content-Length: 5", target=TARGET + "?a=b"),
        head_text("Content-Length: 5", target="/v2/models/m/infer/"),
        head_text("Content-Length: 5", target="/v2/models/a/b/infer"),
        head_text("Content-Length: 5", version="1.0"),
        head_text(),
        head_text(f"Content-Length: {MAX_BODY_BYTES + 1}"),
        head_text("Content-Length: 5", "Content-Encoding: gzip"),
        head_text("Content-Length: 5", "Accept-Encoding: gzip"),
        head_text("Content-Length: 5", "Content-Type: image/png"),
        head_text("Content-Length: 5", "Inference-Header-Content-Length: five"),
        head_text("Content-Length: 5", "Inference-Header-Content-Length: -5"),
        head_text("Content-Length: 5", "Inference-Header-Content-Length: 9999999999999999999"),
    ],
)
def test_what_aiohttp_answers_has_a_known_end(text: bytes) -> None:
    head = parse(text)
    assert not head.fast
    assert not head.endless
    assert head.refusal is None
    length = text.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
    assert head.size == len(text) + int(length or 0)


def test_a_list_of_encodings_is_an_offer_and_no_wish() -> None:
    assert parse(head_text("Content-Length: 5", "Accept-Encoding: gzip, deflate, br")).fast


def test_where_these_end_is_aiohttps_to_find() -> None:
    assert parse(head_text("Upgrade: h2c", "Connection: upgrade")).endless
    for codings in (["gzip, chunked"], ["gzip", "chunked"], ["chunked", "chunked"]):
        head = parse(head_text(*(f"Transfer-Encoding: {coding}" for coding in codings)))
        assert head.endless or head.refusal
        assert not head.chunked


def test_plain_chunks_tell_their_end() -> None:
    for expectation in ([], ["Expect: 100-continue"]):
        head = parse(head_text("Transfer-Encoding: Chunked", *expectation))
        assert (head.chunked, head.endless, head.fast) == (True, False, False)


def test_a_body_that_waits_for_a_word_has_a_known_end() -> None:
    text = head_text("Content-Length: 5", "Expect: 100-continue")
    head = parse(text)
    assert (head.size, head.endless, head.fast) == (len(text) + 5, False, False)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (head_text("Content-Length: 5", "Content-Length: 6"), 400),
        (head_text("Content-Length: +5"), 400),
        (head_text("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (head_text("a b: c"), 400),
        (head_text("Content-Length: 5", "Expect: gifts"), 417),
        (head_text(version="2.0"), 505),
    ],
)
def test_what_is_no_request_is_refused(text: bytes, status: int) -> None:
    refusal = parse(text).refusal
    assert refusal is not None
    assert refusal[0] == status
    assert refusal[1]


def test_json_is_limited_more_than_binary_tensors() -> None:
    size = f"Content-Length: {MAX_JSON_BYTES + 1}"
    heads = Heads(2 * MAX_JSON_BYTES)
    for headers in ([size], [size, f"Inference-Header-Content-Length: {MAX_JSON_BYTES + 1}"]):
        refusal = heads.parse(head_text(*headers)).refusal
        assert refusal is not None
        assert refusal[0] == 413
        assert "send tensors as binary data" in refusal[1]
    assert heads.parse(head_text(size, "Inference-Header-Content-Length: 100")).fast


def test_the_cache_answers_the_same_and_stays_bounded() -> None:
    heads = Heads(MAX_BODY_BYTES)
    text = head_text("Content-Length: 5")
    assert heads.parse(text) is heads.parse(text)
    for i in range(3 * CACHED_BYTES // 10_000):
        heads.parse(head_text("Content-Length: 5", f"X: {i:010000d}"))
    assert sum(map(len, heads._known)) <= CACHED_BYTES
    assert heads.parse(text) == parse(text)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"P", None),
        (b"POST /v2 HTTP/1.1\r\nHost: x\r", None),
        (b"POST /v2 HTTP/1.1\n", 400),
        (b"\x16\x03\x01", 400),
        (b"{", 400),
        (b"G" * (MAX_HEAD_BYTES + 1), 431),
    ],
)
def test_a_beginning_that_cannot_become_a_head(text: bytes, status: int | None) -> None:
    error = cannot_become_a_head(text)
    assert (error and error.status) == status
