"""Properties of V2 bodies over drawn datatypes, shapes and values; hostile bytes may only cause RequestError."""

import functools
import json
import random
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ensemble_contract.tensors import NUMPY_DTYPES, TensorSpec
from ensemble_gateway.request import Answer, InferHeader, InputPart, Model, RequestError
from ensemble_gateway.v2 import (
    answer_prefix,
    binary_sizes,
    compress,
    decompress,
    encode_answer,
    parse_header,
    split_body,
)

MAX_ROWS = 64
MODEL = Model(
    "ens",
    "1",
    (TensorSpec("image", "FP32", (2, 3)), TensorSpec("mask", "BOOL", (2,)), TensorSpec("age", "INT16", ())),
    (TensorSpec("p", "FP32", (4,)), TensorSpec("b", "BF16", (2,)), TensorSpec("k", "UINT64", ())),
    {"p": ("a", "b")},
)
VALID = json.dumps(
    {
        "id": "42",
        "parameters": {"timeout": 1000, "quorum": 1, "members": True, "binary_data_output": True},
        "inputs": [
            {"name": "age", "shape": [2], "datatype": "INT16", "data": [-7, 30000]},
            {"name": "image", "shape": [2, 2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 48}},
            {"name": "mask", "shape": [2, 2], "datatype": "BOOL", "data": [[True, False], [False, True]]},
        ],
        "outputs": [
            {"name": "p", "parameters": {"classification": 2, "binary_data": False}},
            {"name": "k", "parameters": {"binary_data": True}},
        ],
    }
).encode()
# Pieces that break more than random bytes do.
TOKENS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 30,
    b"\\ud800",
    b"\xff",
    b"\0",
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


T = TypeVar("T")


def attempt(call: Callable[[], T]) -> T | RequestError:
    """What `call` returns, or the RequestError that it raises; anything else escapes and fails the test."""
    try:
        return call()
    except RequestError as error:
        return error


def check(text: bytes, binary_bytes: int) -> InferHeader | None:
    """Parse: what is refused is the client's fault and says so; what is accepted keeps its promises."""
    header = attempt(lambda: parse_header(MODEL, text, binary_bytes, max_rows=MAX_ROWS))
    if isinstance(header, RequestError):
        assert header.status in (400, 413)
        assert 0 < len(str(header)) < 1000
        return None
    assert 1 <= header.rows <= MAX_ROWS
    claimed = 0
    for spec, part in zip(MODEL.inputs, header.inputs, strict=True):
        if part.array is None:
            assert part.stop - part.start == header.rows * spec.row_bytes
            claimed += part.stop - part.start
        else:
            assert part.array.shape == (header.rows, *spec.shape)
            assert part.array.dtype == spec.dtype
    assert claimed == binary_bytes
    return header


def mutated(text: bytes, chance: random.Random) -> bytes:
    body = bytearray(text)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(body) + 1)
        stop = min(len(body), start + chance.choice((0, 0, 1, 1, 2, 8, 40)))
        piece = chance.choice((b"", chance.randbytes(1), chance.choice(TOKENS), bytes(body[start:stop]) * 2))
        body[start:stop] = piece
    return bytes(body)


def test_the_seed_of_the_fuzzer_is_valid() -> None:
    assert check(VALID, 48) is not None


def test_mutated_headers_raise_only_request_errors() -> None:
    chance = random.Random(20240)
    deadline = time.monotonic() + 3.0
    refused = 0
    for _ in range(20_000):
        refused += check(mutated(VALID, chance), 48) is None
        if time.monotonic() > deadline:
            break
    assert refused > 100


def test_mutated_compressed_bodies_raise_only_request_errors() -> None:
    chance = random.Random(7)
    for encoding in ("gzip", "deflate"):
        packed, _ = compress(VALID, encoding)
        for _ in range(1_000):
            body = mutated(packed, chance)
            plain = attempt(functools.partial(decompress, body, encoding, 10_000))
            assert plain.status in (400, 413) if isinstance(plain, RequestError) else len(plain) <= 10_000


@given(JSON_VALUES)
@settings(max_examples=200, deadline=None)
def test_any_json_raises_only_request_errors(anything: Any) -> None:
    check(json.dumps(anything).encode(), 0)


@given(st.sampled_from(("id", "inputs", "outputs", "parameters")), JSON_VALUES)
@settings(max_examples=200, deadline=None)
def test_any_value_in_any_field_raises_only_request_errors(field: str, anything: Any) -> None:
    check(json.dumps(json.loads(VALID) | {field: anything}).encode(), 48)


@given(st.sampled_from(("name", "shape", "datatype", "parameters", "data")), st.integers(0, 2), JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_of_an_input_raises_only_request_errors(field: str, index: int, anything: Any) -> None:
    request = json.loads(VALID)
    request["inputs"][index][field] = anything
    check(json.dumps(request).encode(), 48)


@given(st.binary(max_size=64), st.none() | st.integers(-3, 70) | st.text(max_size=4) | st.binary(max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_body_is_split_whole_or_refused(body: bytes, length: int | str | bytes | None) -> None:
    parts = attempt(lambda: split_body(body, length))
    if isinstance(parts, RequestError):
        assert parts.status == 400
    else:
        assert parts[0] + bytes(parts[1]) == body


@st.composite
def tensors(draw: st.DrawFn, json_form: bool) -> tuple[TensorSpec, np.ndarray]:
    """A spec and an array of some rows of it, finite where JSON must hold it."""
    datatype = draw(st.sampled_from([name for name in NUMPY_DTYPES if not (json_form and name == "BF16")]))
    dtype = NUMPY_DTYPES[datatype]
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    rows = draw(st.integers(1, 5))
    elements = None
    if dtype.kind == "f":
        width = cast("Literal[16, 32, 64]", 8 * dtype.itemsize)
        elements = st.floats(width=width, allow_nan=not json_form, allow_infinity=not json_form)
    array = draw(npst.arrays(dtype, (rows, *shape), elements=elements))
    return TensorSpec("x", datatype, shape), array


@given(tensors(json_form=True), st.booleans())
@settings(max_examples=300, deadline=None)
def test_json_tensors_round_trip(drawn: tuple[TensorSpec, np.ndarray], nested: bool) -> None:
    spec, array = drawn
    model = Model("m", "1", (spec,), (spec,), {})
    data = (array if nested else array.reshape(-1)).tolist()
    text = json.dumps(
        {"inputs": [{"name": "x", "shape": array.shape, "datatype": spec.datatype, "data": data}]}, indent=1
    )
    header = parse_header(model, text.encode(), 0, max_rows=5)
    [part] = header.inputs
    assert part.array is not None
    assert part.array.dtype == spec.dtype
    np.testing.assert_array_equal(part.array, array)
    answered = json.loads(encode_answer(header, Answer({"x": array})).json)["outputs"][0]
    back = np.array(answered["data"], spec.dtype).reshape(answered["shape"])
    np.testing.assert_array_equal(back, array)


@given(tensors(json_form=False))
@settings(max_examples=200, deadline=None)
def test_binary_tensors_round_trip_bit_by_bit(drawn: tuple[TensorSpec, np.ndarray]) -> None:
    spec, array = drawn
    model = Model("m", "1", (spec,), (spec,), {})
    tensor = {"name": "x", "shape": array.shape, "datatype": spec.datatype}
    request = {
        "inputs": [tensor | {"parameters": {"binary_data_size": array.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(request).encode()
    header_text, binary = split_body(text + array.tobytes(), len(text))
    header = parse_header(model, header_text, len(binary), max_rows=5)
    assert header.inputs == (InputPart(0, array.nbytes),)
    encoded = encode_answer(header, Answer({"x": array}))
    assert b"".join(encoded.binary) == array.tobytes()
    assert encoded.json == answer_prefix(header, header.rows, True)
    assert binary_sizes(header, header.rows) == {"x": array.nbytes}


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@given(body=st.binary(max_size=100), repeat=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_compression_round_trips(encoding: str, body: bytes, repeat: int) -> None:
    plain = body * repeat
    packed, used = compress(plain, encoding)
    assert decompress(packed, used or "identity", len(plain)) == plain
