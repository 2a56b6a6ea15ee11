"""Answers as V2 bodies: binary, JSON and classified outputs, members' outputs, and the head that can be cached."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec, fp32_to_bf16
from ensemble_gateway.request import Answer, InferHeader, Model, OutputWish, RequestError
from ensemble_gateway.v2 import EncodedAnswer, answer_prefix, binary_sizes, encode_answer, error_body

LABELS = ("cat", "dog", "größer")
P = TensorSpec("p", "FP32", (4,))
COUNT = TensorSpec("count", "UINT8", (2, 3))
MODEL = Model("ens", "7", (TensorSpec("x", "FP32", (1,)),), (P, COUNT), {"p": LABELS})
PS = np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]], np.float32)
COUNTS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
ANSWER = Answer({"p": PS, "count": COUNTS}, used=("a", "b"))


def asked(*wishes: OutputWish, binary: bool = False, members: bool = False, text_id: str = "") -> InferHeader:
    return InferHeader(MODEL, 2, (), wishes, binary_default=binary, id=text_id, members=members)


def head(encoded: EncodedAnswer) -> dict[str, Any]:
    parsed = json.loads(encoded.json)
    assert isinstance(parsed, dict)
    return parsed


def classes(array: np.ndarray, datatype: str, count: int, labels: tuple[str, ...] = ()) -> list[str]:
    spec = TensorSpec("y", datatype, array.shape[1:])
    model = Model("m", "1", (), (spec,), {"y": labels} if labels else {})
    encoded = encode_answer(InferHeader(model, len(array), (), (OutputWish("y", False, count),)), Answer({"y": array}))
    output = head(encoded)["outputs"][0]
    assert output["datatype"] == "BYTES"
    assert output["shape"] == [len(array), len(output["data"]) // len(array)]
    return list(output["data"])


def test_without_wishes_all_outputs_come_as_the_request_says() -> None:
    assert head(encode_answer(asked(), ANSWER)) == {
        "model_name": "ens",
        "model_version": "7",
        "outputs": [
            {"name": "p", "datatype": "FP32", "shape": [2, 4], "data": PS.astype(float).reshape(-1).tolist()},
            {"name": "count", "datatype": "UINT8", "shape": [2, 2, 3], "data": list(range(12))},
        ],
    }
    assert encode_answer(asked(), ANSWER).header_length is None
    encoded = encode_answer(asked(binary=True, text_id="é1"), ANSWER)
    assert encoded.header_length == len(encoded.json)
    assert head(encoded)["id"] == "é1"
    assert b"".join(encoded.binary) == PS.tobytes() + COUNTS.tobytes()


def test_wishes_choose_order_and_form() -> None:
    encoded = encode_answer(asked(OutputWish("count", True), OutputWish("p", False)), ANSWER)
    assert [output["name"] for output in head(encoded)["outputs"]] == ["count", "p"]
    assert head(encoded)["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert "parameters" not in head(encoded)["outputs"][1]
    assert b"".join(encoded.binary) == COUNTS.tobytes()


def test_binary_outputs_are_not_copied_unless_they_must_be() -> None:
    [piece] = encode_answer(asked(OutputWish("p", True)), ANSWER).binary
    assert np.shares_memory(np.frombuffer(piece, np.float32), PS)
    turned = Answer({"p": np.asfortranarray(PS)})
    assert b"".join(encode_answer(asked(OutputWish("p", True)), turned).binary) == PS.tobytes()


@pytest.mark.parametrize("wishes", [(), (OutputWish("p", True),), (OutputWish("count", True), OutputWish("p", True))])
@pytest.mark.parametrize("text_id", ["", "7"])
def test_the_prefix_is_what_the_answer_starts_with(wishes: tuple[OutputWish, ...], text_id: str) -> None:
    header = asked(*wishes, binary=True, text_id=text_id)
    encoded = encode_answer(header, ANSWER)
    assert answer_prefix(header, 2, True) == encoded.json
    sizes = binary_sizes(header, 2)
    assert list(sizes) == ([wish.name for wish in wishes] or ["p", "count"])
    assert list(sizes.values()) == [len(piece) for piece in encoded.binary]


@pytest.mark.parametrize(
    "header",
    [
        asked(),
        asked(OutputWish("p", False)),
        asked(OutputWish("p", True, 1)),
        asked(OutputWish("p", True), OutputWish("count", False)),
        asked(binary=True, members=True),
    ],
)
def test_an_answer_that_varies_has_no_prefix(header: InferHeader) -> None:
    assert answer_prefix(header, 2, True) is None


def test_an_answer_with_members_missing_has_no_prefix_and_names_them() -> None:
    header = asked(binary=True)
    assert answer_prefix(header, 2, False) is None
    encoded = encode_answer(header, Answer(ANSWER.outputs, used=("a", "c"), missing=("b", "d")))
    assert head(encoded)["parameters"] == {"members_used": "a,c", "members_missing": "b,d"}


def test_members_follow_each_output_in_its_form() -> None:
    outputs = ANSWER.outputs | {"a.p": PS + 1, "b.p": PS + 2, "a.count": COUNTS + 1, "b.count": COUNTS + 2}
    answer = Answer(outputs, used=("a", "b"))
    encoded = encode_answer(asked(OutputWish("count", True), OutputWish("p", False, 1), members=True), answer)
    found = head(encoded)
    assert found["parameters"] == {"members_used": "a,b", "members_missing": ""}
    assert [output["name"] for output in found["outputs"]] == ["count", "a.count", "b.count", "p", "a.p", "b.p"]
    assert b"".join(encoded.binary) == b"".join((COUNTS + i).tobytes() for i in range(3))
    assert found["outputs"][4]["data"] == ["1.400000:3", "2.000000:0:cat"]
    assert found["outputs"][4]["shape"] == [2, 1]


def test_outputs_of_members_that_did_not_answer_are_left_out() -> None:
    specs = tuple(TensorSpec(f"{member}.p", "FP32", (4,)) for member in ("a", "b"))
    header = InferHeader(Model("ens", "1", (), specs, {}), 2, (), binary_default=True)
    encoded = encode_answer(header, Answer({"b.p": PS}, used=("b",), missing=("a",)))
    assert [output["name"] for output in head(encoded)["outputs"]] == ["b.p"]
    assert head(encoded)["parameters"] == {"members_used": "b", "members_missing": "a"}


def test_classes_are_written_as_triton_writes_them() -> None:
    expected = ["0.400000:3", "0.300000:2:größer", "0.200000:1:dog", "0.100000:0:cat"]
    assert classes(PS[:1], "FP32", 4, LABELS[:3]) == expected
    assert classes(PS[:1], "FP32", 2, LABELS[:3]) == expected[:2]
    assert classes(PS[:1], "FP32", 99) == ["0.400000:3", "0.300000:2", "0.200000:1", "0.100000:0"]


def test_equal_classes_come_by_index() -> None:
    assert classes(PS[1:], "FP32", 3) == ["1.000000:0", "0.000000:1", "0.000000:2"]
    rows = np.array([[5, 5, 0], [0, 255, 255]], np.uint8)
    assert classes(rows, "UINT8", 2) == ["5:0", "5:1", "255:1", "255:2"]


@pytest.mark.parametrize(
    ("datatype", "array", "expected"),
    [
        ("INT64", np.array([[-(2**63), 2**63 - 1]]), [f"{2**63 - 1}:1", f"{-(2**63)}:0"]),
        ("UINT64", np.array([[2**64 - 1, 1]], np.uint64), [f"{2**64 - 1}:0", "1:1"]),
        ("FP64", np.array([[1e-9, 1e10]]), ["10000000000.000000:1", "0.000000:0"]),
        ("FP16", np.array([[0.1, -1]], np.float16), ["0.099976:0", "-1.000000:1"]),
        ("BF16", fp32_to_bf16(np.array([[-1, 0.5]], np.float32)), ["0.500000:1", "-1.000000:0"]),
        ("INT32", np.array([[[1, 4], [3, 2]]], np.int32), ["4:1", "3:2"]),
    ],
)
def test_classes_of_every_datatype(datatype: str, array: np.ndarray, expected: list[str]) -> None:
    assert classes(array, datatype, 2) == expected


def test_binary_classes_have_their_lengths_before_them() -> None:
    encoded = encode_answer(asked(OutputWish("p", True, 1)), Answer({"p": PS[:, [0, 1, 2, 1]]}))
    first, second = b"0.300000:2:gr\xc3\xb6\xc3\x9fer", b"1.000000:0:cat"
    tail = struct.pack("<I", len(first)) + first + struct.pack("<I", len(second)) + second
    assert encoded.binary == [tail]
    assert head(encoded)["outputs"] == [
        {"name": "p", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(tail)}}
    ]


@pytest.mark.parametrize(
    ("datatype", "array", "data"),
    [
        ("BOOL", np.array([[True, False]]), [True, False]),
        ("UINT64", np.array([[2**64 - 1]], np.uint64), [2**64 - 1]),
        ("INT64", np.array([[-(2**63)]]), [-(2**63)]),
        ("FP16", np.array([[0.1]], np.float16), [0.0999755859375]),
        ("FP32", np.array([[0.1, 1e-45]], np.float32), [0.10000000149011612, 1.401298464324817e-45]),
        ("FP64", np.array([[0.1, 5e-324]]), [0.1, 5e-324]),
    ],
)
def test_json_elements_are_exact(datatype: str, array: np.ndarray, data: list[object]) -> None:
    model = Model("m", "1", (), (TensorSpec("y", datatype, array.shape[1:]),), {})
    assert head(encode_answer(InferHeader(model, 1, ()), Answer({"y": array})))["outputs"][0]["data"] == data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_hold_is_refused_but_goes_as_binary(value: float) -> None:
    answer = Answer({"p": np.full((2, 4), value, np.float32), "count": COUNTS})
    with pytest.raises(RequestError) as caught:
        encode_answer(asked(), answer)
    assert caught.value.status == 400
    message = "output 'p' holds NaN or Infinity, which have no JSON form: request it with binary_data true"
    assert str(caught.value) == message
    assert encode_answer(asked(OutputWish("p", True)), answer).header_length is not None


def test_errors_are_v2_objects() -> None:
    assert json.loads(error_body('no "x"\n√')) == {"error": 'no "x"\n√'}
