"""The JSON part of an infer request: what is read from it, and how each mistake is named."""

import json
import tracemalloc

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import InferHeader, InputPart, Model, OutputWish, RequestError
from ensemble_gateway.v2 import parse_header

MAX_ROWS = 1000
IMAGE = Model(
    "ens",
    "1",
    (TensorSpec("image", "FP32", (2, 3)),),
    (TensorSpec("p", "FP32", (4,)), TensorSpec("q", "BF16", (2,))),
    {},
)
PAIR = Model(
    "pair",
    "2",
    (TensorSpec("a", "UINT8", (2,)), TensorSpec("b", "INT64", ())),
    (TensorSpec("y", "FP32", (3,)), TensorSpec("flag", "BOOL", (1,))),
    {},
)


def image_input(rows: int = 1, **changes: object) -> dict[str, object]:
    tensor: dict[str, object] = {
        "name": "image",
        "shape": [rows, 2, 3],
        "datatype": "FP32",
        "parameters": {"binary_data_size": rows * 24},
    }
    return {key: value for key, value in (tensor | changes).items() if value is not None}


def body(*inputs: object, binary_output: bool = True, **fields: object) -> bytes:
    parameters = {"binary_data_output": binary_output}
    given = fields.pop("parameters", {})
    assert isinstance(given, dict)
    return json.dumps({"inputs": list(inputs), "parameters": parameters | given, **fields}).encode()


def parse(model: Model, text: bytes, binary_bytes: int = 0) -> InferHeader:
    return parse_header(model, text, binary_bytes, max_rows=MAX_ROWS)


def refusal(model: Model, text: bytes, binary_bytes: int = 0) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        parse(model, text, binary_bytes)
    return caught.value.status, str(caught.value)


def single(datatype: str, *shape: int) -> Model:
    return Model("one", "1", (TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", (1,)),), {})


def json_body(datatype: str, shape: list[int], data: str) -> bytes:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'.encode()


def test_a_binary_request_is_read_whole() -> None:
    text = body(
        image_input(3),
        id="42",
        parameters={"timeout": 1_500_000, "quorum": 2, "members": True, "priority": 7, "mine": {"x": [1]}},
        outputs=[{"name": "p", "parameters": {"binary_data": False, "classification": 5}}, {"name": "q"}],
    )
    assert parse(IMAGE, text, 72) == InferHeader(
        model=IMAGE,
        rows=3,
        inputs=(InputPart(0, 72),),
        wishes=(OutputWish("p", False, 5), OutputWish("q", True)),
        binary_default=True,
        id="42",
        timeout_s=1.5,
        quorum=2,
        members=True,
    )


def test_binary_parts_follow_the_clients_order_and_inputs_the_models() -> None:
    b = {"name": "b", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}}
    a = {"name": "a", "shape": [2, 2], "datatype": "UINT8", "parameters": {"binary_data_size": 4}}
    assert parse(PAIR, body(b, a), 20).inputs == (InputPart(16, 20), InputPart(0, 16))
    assert parse(PAIR, body(a, b), 20).inputs == (InputPart(0, 4), InputPart(4, 20))


def test_json_and_binary_inputs_mix() -> None:
    a = {"name": "a", "shape": [2, 2], "datatype": "UINT8", "data": [[1, 2], [3, 255]]}
    b = {"name": "b", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}}
    first, second = parse(PAIR, body(a, b), 16).inputs
    assert first.array is not None
    assert first.array.tolist() == [[1, 2], [3, 255]]
    assert first.array.dtype == np.uint8
    assert second == InputPart(0, 16)


def test_an_output_is_binary_as_it_says_itself_else_as_the_request_says() -> None:
    text = body(image_input(), outputs=[{"name": "p"}], binary_output=False)
    assert parse(IMAGE, text, 24).wishes == (OutputWish("p", False),)
    text = body(image_input(), outputs=[{"name": "p", "parameters": {"binary_data": True}}], binary_output=False)
    assert parse(IMAGE, text, 24).wishes == (OutputWish("p", True),)


def test_a_body_without_json_is_rows_of_the_only_input() -> None:
    header = parse(IMAGE, b"", 48)
    assert (header.rows, header.inputs, header.binary_default) == (2, (InputPart(0, 48),), True)
    assert refusal(IMAGE, b"", 49)[1] == "input 'image': 49 bytes are not a whole number of rows of 24 bytes"
    assert refusal(IMAGE, b"", 24 * (MAX_ROWS + 1))[0] == 413
    assert "only possible for models with one input, not a, b" in refusal(PAIR, b"", 10)[1]
    assert "the body is empty" in refusal(IMAGE, b"", 0)[1]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (image_input(name="x"), "unknown input 'x': model 'ens' has the inputs image"),
        (image_input(datatype="FP16"), "input 'image': datatype 'FP16' does not match FP32"),
        (image_input(shape=[2, 3]), "input 'image': shape [2, 3] does not match [rows, 2, 3]"),
        (image_input(shape=[1, 2, 3, 1]), "input 'image': shape [1, 2, 3, 1] does not match [rows, 2, 3]"),
        (image_input(shape=[]), "input 'image': shape [] does not match [rows, 2, 3]"),
        (image_input(shape=[0, 2, 3]), "input 'image': 0 rows: a request has at least one"),
        (image_input(shape=[-1, 2, 3]), "input 'image': -1 rows: a request has at least one"),
        (image_input(shape=[1, 2.5, 3]), "input 'image': shape must be a list of integers, got [1, 2.5, 3]"),
        (image_input(shape="1,2,3"), "input 'image': shape must be a list of integers, got \"1,2,3\""),
        (image_input(shape=[1] * 500), "input 'image': shape has more dimensions than any tensor here"),
        (image_input(shape=None), "the request's JSON: inputs[0]: object missing required field shape"),
        (image_input(datatype=3), "the request's JSON: inputs[0].datatype: expected str, got int"),
        (image_input(parameters=None), "input 'image' has neither data nor the parameter binary_data_size"),
        (image_input(data=[1, 2, 3, 4, 5, 6]), "input 'image' has both data and the parameter binary_data_size"),
        (
            image_input(parameters={"binary_data_size": 23}),
            "input 'image': binary_data_size 23 does not match shape [1, 2, 3] of FP32, which takes 24 bytes",
        ),
        (
            image_input(parameters={"binary_data_size": -24}),
            "the request's JSON: inputs[0].parameters.binary_data_size: expected int >= 0",
        ),
        (
            image_input(parameters={"binary_data_size": 10**30}),
            "the request's JSON: inputs[0].parameters.binary_data_size: expected int <= 9223372036854775807",
        ),
        (
            image_input(parameters={"binary_data_size": "24"}),
            "the request's JSON: inputs[0].parameters.binary_data_size: expected int | null, got str",
        ),
        (
            image_input(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 24}),
            "input 'image': shared memory regions are not served: send and request tensors in the body",
        ),
    ],
)
def test_a_wrong_input_is_named(tensor: dict[str, object], message: str) -> None:
    assert refusal(IMAGE, body(tensor), 24) == (400, message)


def test_inputs_missing_twice_or_of_other_rows_are_named() -> None:
    a = {"name": "a", "shape": [2, 2], "datatype": "UINT8", "data": [1, 2, 3, 4]}
    b = {"name": "b", "shape": [3], "datatype": "INT64", "data": [1, 2, 3]}
    assert refusal(PAIR, body(a)) == (400, "input 'b' is missing: model 'pair' needs a, b")
    assert refusal(PAIR, body()) == (400, "input 'a' is missing: model 'pair' needs a, b")
    assert refusal(PAIR, body(a, a)) == (400, "input 'a' is given twice")
    assert refusal(PAIR, body(a, b)) == (400, "input 'b': 3 rows, but input 'a' has 2")


@pytest.mark.parametrize("present", [0, 23, 25, 600])
def test_the_binary_part_must_be_what_the_inputs_say(present: int) -> None:
    message = f"the binary part of the body has {present} bytes, the inputs' binary_data_size sum to 24"
    assert refusal(IMAGE, body(image_input()), present) == (400, message)


def test_ten_million_rows_are_refused_before_anything_is_allocated() -> None:
    message = "input 'x': 10000000 rows are over the limit of 1000 rows a request: send fewer at once"
    model = single("FP32", 1000)
    tracemalloc.start()
    assert refusal(model, json_body("FP32", [10_000_000, 1000], "[1]")) == (413, message)
    assert refusal(model, json_body("FP32", [1000, 1000], "[1]"))[0] == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([{"name": "z"}], "unknown output 'z': model 'pair' has the outputs y, flag"),
        ([{"name": "y"}, {"name": "y"}], "output 'y' is requested twice"),
        (
            [{"name": "flag", "parameters": {"classification": 1}}],
            "output 'flag': classification is not possible for BOOL",
        ),
        (
            [{"name": "y", "parameters": {"classification": -1}}],
            "the request's JSON: outputs[0].parameters.classification: expected int >= 0",
        ),
        (
            [{"name": "y", "parameters": {"binary_data": "yes"}}],
            "the request's JSON: outputs[0].parameters.binary_data: expected bool | null, got str",
        ),
        (
            [{"name": "y", "parameters": {"shared_memory_region": "r"}}],
            "output 'y': shared memory regions are not served: send and request tensors in the body",
        ),
        ("y", "the request's JSON: outputs: expected array | null, got str"),
    ],
)
def test_a_wrong_output_is_named(outputs: object, message: str) -> None:
    a = {"name": "a", "shape": [1, 2], "datatype": "UINT8", "data": [1, 2]}
    b = {"name": "b", "shape": [1], "datatype": "INT64", "data": [1]}
    assert refusal(PAIR, body(a, b, outputs=outputs)) == (400, message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"timeout": 0}, "the request's JSON: parameters.timeout: expected int >= 1"),
        ({"timeout": -5}, "the request's JSON: parameters.timeout: expected int >= 1"),
        ({"timeout": "1s"}, "the request's JSON: parameters.timeout: expected int | null, got str"),
        ({"timeout": 1.5}, "the request's JSON: parameters.timeout: expected int | null, got float"),
        ({"quorum": 0}, "the request's JSON: parameters.quorum: expected int >= 1"),
        ({"quorum": True}, "the request's JSON: parameters.quorum: expected int | null, got bool"),
        ({"members": 1}, "the request's JSON: parameters.members: expected bool, got int"),
        ({"sequence_id": 5}, "parameters.sequence_id: sequences are not served: every request stands alone"),
        ({"sequence_start": True}, "parameters.sequence_start: sequences are not served: every request stands alone"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, object], message: str) -> None:
    assert refusal(IMAGE, body(image_input(), parameters=parameters), 24) == (400, message)


def test_a_sequence_that_is_none_and_parameters_of_others_are_ignored() -> None:
    parameters = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "headers": {"a": "b"}}
    assert parse(IMAGE, body(image_input(), parameters=parameters), 24).rows == 1


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"{", "the request's JSON cannot be read: "),
        (b"[]", "the request's JSON: expected object, got array"),
        (b"{}", "the request's JSON: object missing required field inputs"),
        (b'{"inputs":{}}', "the request's JSON: inputs: expected array, got object"),
        (b'{"inputs":[],"id":7}', "the request's JSON: id: expected str, got int"),
        (b'{"inputs":[],"id":"\xff"}', "the request's JSON cannot be read: "),
        (b'{"inputs":' + b"[" * 100_000, "the request's JSON"),
        (b'{"x":' + b"[" * 2_000, "the request's JSON is nested too deeply"),
        (json_body("FP32", [1, 2], "[1.0,NaN]"), "NaN and Infinity have no JSON form: send the tensor as binary data"),
    ],
)
def test_json_that_is_none_of_ours_is_explained(text: bytes, fragment: str) -> None:
    status, message = refusal(single("FP32", 2), text)
    assert status == 400
    assert fragment in message


def test_long_names_are_not_echoed_whole() -> None:
    assert len(refusal(IMAGE, body(image_input(name="x" * 100_000)), 24)[1]) < 300


@pytest.mark.parametrize(
    "text",
    [
        b'{"inputs":[' + b"{}," * 200_000 + b"{}]}",
        b'{"inputs":[],"outputs":[' + b'{"name":"y"},' * 200_000 + b'{"name":"y"}]}',
        b'{"inputs":[],"id":"' + b"x" * 4_000_000 + '😀"}'.encode(),
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[' + b"1000," * 500_000 + b'1],"data":[1]}]}',
        b'{"inputs":[],"parameters":{"sequence_id":[' + b"1000," * 500_000 + b"1]}}",
    ],
)
def test_what_is_large_but_no_tensor_is_refused_in_the_memory_of_its_text(text: bytes) -> None:
    tracemalloc.start()
    assert refusal(single("FP32", 1), text)[0] == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(text)


def test_bf16_outputs_want_binary() -> None:
    message = "output 'q': BF16 has no JSON form: request it with binary_data true"
    assert refusal(IMAGE, body(image_input(), binary_output=False), 24) == (400, message)
    text = body(image_input(), outputs=[{"name": "q", "parameters": {"binary_data": False}}])
    assert refusal(IMAGE, text, 24) == (400, message)
    text = body(image_input(), outputs=[{"name": "q", "parameters": {"binary_data": False, "classification": 1}}])
    assert parse(IMAGE, text, 24).wishes == (OutputWish("q", False, 1),)
