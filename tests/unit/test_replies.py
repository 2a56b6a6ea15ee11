"""Replies as bytes on the wire, and what is remembered of them."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.replies import CACHED_PREFIXES, Replies, error_reply, full_reply
from ensemble_gateway.request import Answer, InferHeader, InputPart, Model, OutputWish, RequestError
from tests.support.http_client import Reply

MODEL = Model(
    "m", "1", (TensorSpec("x", "FP32", (2,)),), (TensorSpec("y", "FP32", (2,)), TensorSpec("z", "INT64", ())), {}
)
HEADER = InferHeader(MODEL, 3, (InputPart(0, 24),), binary_default=True)
Y = np.arange(6, dtype=np.float32).reshape(3, 2)
Z = np.arange(3, dtype=np.int64)


def parsed(text: bytes) -> Reply:
    head, _, body = text.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body)
    return Reply(int(first.split()[1]), headers, body)


def test_a_prefix_and_tensors_are_the_whole_reply() -> None:
    prefix = Replies().prefix(HEADER, keep_alive=True)
    assert prefix is not None
    text = prefix.join_with([Y, Z])
    assert text == full_reply(HEADER, Answer({"y": Y, "z": Z}), keep_alive=True)
    reply = parsed(text)
    np.testing.assert_array_equal(reply.y("y"), Y)
    assert reply.body.endswith(Z.tobytes())


def test_wished_outputs_come_in_the_wished_order() -> None:
    header = replace(HEADER, wishes=(OutputWish("z", True), OutputWish("y", True)))
    prefix = Replies().prefix(header, keep_alive=True)
    assert prefix is not None
    assert prefix.join_with([Y, Z]).endswith(Z.tobytes() + Y.tobytes())


@pytest.mark.parametrize(
    "header", [replace(HEADER, binary_default=False), replace(HEADER, wishes=(OutputWish("y", True, classes=1),))]
)
def test_no_prefix_where_the_text_depends_on_the_answer(header: InferHeader) -> None:
    assert Replies().prefix(header, keep_alive=True) is None
    reply = parsed(full_reply(header, Answer({"y": Y, "z": Z}), keep_alive=True))
    length = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    assert json.loads(reply.body[:length])["outputs"][0]["name"] == "y"


def test_connection_close_is_said() -> None:
    replies = Replies()
    for keep_alive in (True, False):
        prefix = replies.prefix(HEADER, keep_alive)
        assert prefix is not None
        texts = [
            prefix.join_with([Y, Z]),
            full_reply(HEADER, Answer({"y": Y, "z": Z}), keep_alive),
            error_reply(RequestError(400, "no"), keep_alive),
        ]
        assert [parsed(text).headers.get("connection") for text in texts] == [None if keep_alive else "close"] * 3


def test_a_header_is_looked_up_by_identity() -> None:
    replies = Replies()
    assert replies.prefix(HEADER, keep_alive=True) is replies.prefix(HEADER, keep_alive=True)
    other = replies.prefix(replace(HEADER, id="7"), keep_alive=True)
    assert other is not None
    assert b'"id":"7"' in other.text


def test_headers_with_tensors_are_not_remembered() -> None:
    """Each holds its rows: a thousand of them would hold a thousand requests' memory."""
    replies = Replies()
    array = np.ones((3, 2), np.float32)
    alive = weakref.ref(array)
    header = replace(HEADER, inputs=(InputPart(array=array),))
    assert replies.prefix(header, keep_alive=True) is not None
    del array, header
    gc.collect()
    assert alive() is None


def test_what_is_remembered_is_bounded() -> None:
    replies = Replies()
    for i in range(CACHED_PREFIXES + 10):
        replies.prefix(replace(HEADER, id=str(i)), keep_alive=True)
    assert len(replies._prefixes) <= CACHED_PREFIXES
    huge = replace(HEADER, id="x" * 10_000)
    before = len(replies._prefixes)
    assert replies.prefix(huge, keep_alive=True) is not None
    assert len(replies._prefixes) == before


def test_errors_are_v2_errors() -> None:
    reply = parsed(error_reply(RequestError(503, 'say "when"', retry_after_s=2), keep_alive=True))
    assert (reply.status, reply.error, reply.headers["retry-after"]) == (503, 'say "when"', "2")
    assert "retry-after" not in parsed(error_reply(RequestError(400, "no"), keep_alive=True)).headers


def test_json_cannot_hold_infinity() -> None:
    answer = Answer({"y": np.full((3, 2), np.inf, np.float32), "z": Z})
    with pytest.raises(RequestError, match="NaN or Infinity"):
        full_reply(replace(HEADER, binary_default=False), answer, keep_alive=True)
