"""The stock client: what it sends is read, and what we answer it reads."""

import gzip
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import Answer, InferHeader, Model, RequestError
from ensemble_gateway.v2 import EncodedAnswer, compress, decompress, encode_answer, parse_header, split_body

DATATYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}
ROWS = 3


def echo_model(*datatypes: str, labels: tuple[str, ...] = ()) -> Model:
    """A model whose outputs `out_<datatype>` have the form of its inputs `in_<datatype>`."""
    inputs = tuple(TensorSpec(f"in_{datatype}", datatype, (2, 2)) for datatype in datatypes)
    outputs = tuple(TensorSpec(f"out_{datatype}", datatype, (2, 2)) for datatype in datatypes)
    return Model("echo", "3", inputs, outputs, {output.name: labels for output in outputs if labels})


def values(datatype: str) -> np.ndarray:
    numbers = np.arange(ROWS * 4).reshape(ROWS, 2, 2)
    return (numbers % 2 == 0) if datatype == "BOOL" else (numbers * 3).astype(DATATYPES[datatype])


def tensor(datatype: str, binary: bool = True) -> InferInput:
    array = values(datatype)
    return InferInput(f"in_{datatype}", list(array.shape), datatype).set_data_from_numpy(array, binary_data=binary)


def received(model: Model, inputs: list[InferInput], **options: Any) -> tuple[InferHeader, memoryview]:
    body, header_length = InferenceServerClient.generate_request_body(inputs, **options)
    text, binary = split_body(body, header_length)
    return parse_header(model, text, len(binary), max_rows=100), binary


def echoed(header: InferHeader, binary: memoryview, **fields: Any) -> EncodedAnswer:
    """The answer of a model that returns its inputs."""
    outputs = {}
    for spec, given, part in zip(header.model.outputs, header.model.inputs, header.inputs, strict=True):
        array = part.array
        if array is None:
            array = np.frombuffer(binary[part.start : part.stop], given.dtype)
        outputs[spec.name] = array.reshape(header.rows, *spec.shape)
    return encode_answer(header, Answer(outputs, **fields))


def result_of(encoded: EncodedAnswer) -> InferResult:
    body = encoded.json + b"".join(encoded.binary)
    return InferResult.from_response_body(body, header_length=encoded.header_length)


# BF16 has no JSON form: the client refuses it too.
FORMS = [(name, there, back) for name in DATATYPES for there in (True, False) for back in (True, False)]
FORMS = [form for form in FORMS if form[0] != "BF16" or form[1:] == (True, True)]


@pytest.mark.parametrize(("datatype", "binary_input", "binary_output"), FORMS)
def test_every_datatype_goes_there_and_back(datatype: str, binary_input: bool, binary_output: bool) -> None:
    wished = [InferRequestedOutput(f"out_{datatype}", binary_data=binary_output)]
    header, binary = received(echo_model(datatype), [tensor(datatype, binary_input)], outputs=wished)
    array = result_of(echoed(header, binary)).as_numpy(f"out_{datatype}")
    assert array.dtype == values(datatype).dtype
    np.testing.assert_array_equal(array, values(datatype))


def test_json_and_binary_tensors_mix_in_both_directions() -> None:
    model = echo_model("FP32", "INT64", "UINT8", "BF16")
    inputs = [tensor("UINT8"), tensor("INT64", binary=False), tensor("BF16"), tensor("FP32")]
    wished = [
        InferRequestedOutput("out_INT64", binary_data=True),
        InferRequestedOutput("out_FP32", binary_data=False),
        InferRequestedOutput("out_BF16", binary_data=True),
        InferRequestedOutput("out_UINT8", binary_data=True),
    ]
    header, binary = received(model, inputs, outputs=wished)
    result = result_of(echoed(header, binary))
    assert [output["name"] for output in result.get_response()["outputs"]] == [wish.name() for wish in wished]
    for datatype in ("FP32", "INT64", "UINT8", "BF16"):
        np.testing.assert_array_equal(result.as_numpy(f"out_{datatype}"), values(datatype))


def test_without_wishes_all_outputs_come_binary() -> None:
    header, binary = received(echo_model("FP32", "BF16"), [tensor("FP32"), tensor("BF16")])
    encoded = echoed(header, binary)
    assert len(encoded.binary) == 2
    np.testing.assert_array_equal(result_of(encoded).as_numpy("out_BF16"), values("BF16"))


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_as_the_client_reads_them(binary: bool) -> None:
    wished = [InferRequestedOutput("out_FP32", binary_data=binary, class_count=2)]
    header, tail = received(echo_model("FP32", labels=("a", "b", "c", "d")), [tensor("FP32")], outputs=wished)
    array = result_of(echoed(header, tail)).as_numpy("out_FP32")
    texts = [[text.decode() if isinstance(text, bytes) else text for text in row] for row in array.tolist()]
    assert texts == [
        ["9.000000:3:d", "6.000000:2:c"],
        ["21.000000:3:d", "18.000000:2:c"],
        ["33.000000:3:d", "30.000000:2:c"],
    ]


def test_ids_and_parameters_go_there_and_back() -> None:
    custom = {"quorum": 2, "members": True, "mine": "x"}
    header, binary = received(
        echo_model("FP32"), [tensor("FP32")], request_id="ü-7", timeout=250_000, priority=3, parameters=custom
    )
    assert (header.id, header.timeout_s, header.quorum, header.members) == ("ü-7", 0.25, 2, True)
    response = result_of(echoed(header, binary, used=("a", "b"), missing=("c",))).get_response()
    assert response["id"] == "ü-7"
    assert (response["model_name"], response["model_version"]) == ("echo", "3")
    assert response["parameters"] == {"members_used": "a,b", "members_missing": "c"}


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(RequestError, match="sequences are not served"):
        received(echo_model("FP32"), [tensor("FP32")], sequence_id=9, sequence_start=True)
    shared = InferInput("in_FP32", [ROWS, 2, 2], "FP32")
    shared.set_shared_memory("region", 48)
    with pytest.raises(RequestError, match="input 'in_FP32': shared memory regions are not served"):
        received(echo_model("FP32"), [shared])
    wish = InferRequestedOutput("out_FP32")
    wish.set_shared_memory("region", 48)
    with pytest.raises(RequestError, match="output 'out_FP32': shared memory regions are not served"):
        received(echo_model("FP32"), [tensor("FP32")], outputs=[wish])


def test_nan_sent_as_json_is_explained() -> None:
    given = InferInput("in_FP32", [1, 2, 2], "FP32")
    given.set_data_from_numpy(np.full((1, 2, 2), np.nan, np.float32), binary_data=False)
    with pytest.raises(RequestError, match="NaN and Infinity have no JSON form: send the tensor as binary data"):
        received(echo_model("FP32"), [given])


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies_are_read_on_both_sides(encoding: str) -> None:
    model = Model("big", "1", (TensorSpec("x", "FP32", (1000,)),), (TensorSpec("y", "FP32", (1000,)),), {})
    array = np.zeros((1, 1000), np.float32)
    given = InferInput("x", [1, 1000], "FP32").set_data_from_numpy(array)
    body, header_length = InferenceServerClient.generate_request_body([given])
    packed = gzip.compress(body) if encoding == "gzip" else compress(body, encoding)[0]
    text, binary = split_body(decompress(packed, encoding, 10_000), header_length)
    header = parse_header(model, text, len(binary), max_rows=1)
    encoded = encode_answer(header, Answer({"y": array + 1}))
    answer, used = compress(encoded.json + b"".join(encoded.binary), encoding)
    assert used == encoding
    result = InferResult.from_response_body(answer, header_length=encoded.header_length, content_encoding=used)
    np.testing.assert_array_equal(result.as_numpy("y"), array + 1)


def test_nested_data_of_hand_written_requests_is_read() -> None:
    text = json.dumps(
        {"inputs": [{"name": "in_FP32", "shape": [ROWS, 2, 2], "datatype": "FP32", "data": values("FP32").tolist()}]}
    ).encode()
    header = parse_header(echo_model("FP32"), text, 0, max_rows=100)
    result = result_of(echoed(header, memoryview(b"")))
    np.testing.assert_array_equal(result.as_numpy("out_FP32"), values("FP32"))
