"""Tensors as JSON: elements of every datatype, flat and nested, and how each mistake is named."""

import json
import tracemalloc

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import InferHeader, Model, OutputWish, RequestError
from ensemble_gateway.v2 import parse_header


def parse(model: Model, text: bytes) -> InferHeader:
    return parse_header(model, text, 0, max_rows=1000)


def refusal(model: Model, text: bytes) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        parse(model, text)
    return caught.value.status, str(caught.value)


def single(datatype: str, *shape: int) -> Model:
    return Model("one", "1", (TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", (1,)),), {})


def json_body(datatype: str, shape: list[int], data: str) -> bytes:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'.encode()


def array_of(datatype: str, shape: list[int], data: str) -> np.ndarray:
    array = parse(single(datatype, *shape[1:]), json_body(datatype, shape, data)).inputs[0].array
    assert array is not None
    return array


@pytest.mark.parametrize(
    ("datatype", "data", "values"),
    [
        ("BOOL", "[true, false]", [True, False]),
        ("UINT8", "[0, 255]", [0, 255]),
        ("INT8", "[-128, 127]", [-128, 127]),
        ("UINT64", "[0, 18446744073709551615]", [0, 2**64 - 1]),
        ("INT64", "[-9223372036854775808, 9223372036854775807]", [-(2**63), 2**63 - 1]),
        ("FP16", "[65504, -1e-8]", [65504.0, -0.0]),
        ("FP32", "[0.1, 3.4e38]", [float(np.float32(0.1)), float(np.float32(3.4e38))]),
        ("FP64", " [ 0.1 ,\n\t1.7e308 ] ", [0.1, 1.7e308]),
        ("FP32", "[[0.5],[1]]", [0.5, 1.0]),
    ],
)
def test_elements_become_the_declared_datatype(datatype: str, data: str, values: list[object]) -> None:
    shape = [2, 1] if data.startswith("[[") else [2]
    array = array_of(datatype, shape, data)
    assert array.dtype == TensorSpec("x", datatype, ()).dtype
    assert array.reshape(-1).tolist() == values


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "message"),
    [
        ("FP32", [1, 2], "[1]", "input 'x': data has 1 elements, shape [1, 2] takes 2"),
        ("FP32", [1, 2], "[1,2,3]", "input 'x': data has 3 elements, shape [1, 2] takes 2"),
        ("FP32", [1, 2], "[]", "input 'x': data has 0 elements, shape [1, 2] takes 2"),
        ("FP32", [1, 1], "[]", "input 'x': data has 0 elements, shape [1, 1] takes 1"),
        ("FP32", [2, 2], "[[1,2],[3]]", "input 'x': data has 3 elements, shape [2, 2] takes 4"),
        ("FP32", [2, 2], "[[1,2,3],[4]]", "input 'x': data is ragged: it must be flat or nested as its shape [2, 2]"),
        ("FP32", [1, 2], "[1,[2]]", "input 'x': data is ragged: it must be flat or nested as its shape [1, 2]"),
        ("FP32", [1, 2], "[[],[]]", "input 'x': data has 0 elements, shape [1, 2] takes 2"),
        ("FP32", [1, 2], '[1,"a"]', "input 'x': element 1 of data is not a number"),
        ("FP32", [1, 2], '[1,"2,3"]', "input 'x': element 1 of data is not a number"),
        ("FP32", [1, 2], "[null,2]", "input 'x': element 0 of data is not a number"),
        ("FP32", [1, 2], "[true,2]", "input 'x': element 0 of data is not a number"),
        ("FP32", [1, 2], "[{},2]", "input 'x': element 0 of data is not a number"),
        ("FP32", [1, 1], "1.5", "input 'x': data must be an array, got 1.5"),
        ("FP32", [1, 2], "null", "input 'x': data must be an array, got null"),
        ("FP32", [1, 2], "[1,1e39]", "input 'x': element 1 of data is too large for FP32"),
        ("FP32", [1, 2], "[1,1e999]", "input 'x': element 1 of data is no FP32: number out of range"),
        ("FP16", [1, 2], "[65520,1]", "input 'x': element 0 of data is too large for FP16"),
        ("BF16", [1, 2], "[1,2]", "input 'x': BF16 has no JSON form: send the tensor as binary data"),
        ("BOOL", [1, 2], "[true,1]", "input 'x': element 1 of data is not true or false"),
        ("BOOL", [1, 2], "[true,null]", "input 'x': element 1 of data is not true or false"),
        ("UINT8", [1, 2], "[255,256]", "input 'x': element 1 of data is out of the range of UINT8"),
        ("UINT8", [1, 2], "[-1,256]", "input 'x': element 0 of data is out of the range of UINT8"),
        ("INT64", [1, 1], "[9223372036854775808]", "input 'x': element 0 of data is out of the range of INT64"),
        ("FP32", [2, 1], "[[],[]]", "input 'x': data has 0 elements, shape [2, 1] takes 2"),
        ("FP32", [2, 1], "[[1],[ ]]", "input 'x': data has 1 elements, shape [2, 1] takes 2"),
        ("INT32", [1, 2], "[1,1.5]", "input 'x': element 1 of data is no INT32: expected int, got float"),
    ],
)
def test_a_wrong_element_is_named(datatype: str, shape: list[int], data: str, message: str) -> None:
    assert refusal(single(datatype, *shape[1:]), json_body(datatype, shape, data)) == (400, message)


def test_a_wrong_element_far_into_large_data_has_its_index() -> None:
    numbers = ["7"] * 300_000
    numbers[299_990] = "70000"
    message = "input 'x': element 299990 of data is out of the range of UINT16"
    assert refusal(single("UINT16", 300), json_body("UINT16", [1000, 300], f"[{','.join(numbers)}]")) == (400, message)
    numbers[299_990] = "0.5"
    message = "input 'x': element 299990 of data is no UINT16: expected int, got float"
    assert refusal(single("UINT16", 300), json_body("UINT16", [1000, 300], f"[{','.join(numbers)}]")) == (400, message)


@pytest.mark.parametrize("nested", [False, True])
def test_large_json_is_read_exactly_and_in_little_memory(nested: bool) -> None:
    image = np.random.default_rng(0).random((1, 3, 224, 224), dtype=np.float32)
    data = json.dumps((image if nested else image.reshape(-1)).tolist())
    text = json_body("FP32", list(image.shape), data).replace(
        b'{"inputs"', b'{"id":"big","outputs":[{"name":"y"}],"inputs"'
    )
    tracemalloc.start()
    header = parse(single("FP32", 3, 224, 224), text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (header.id, header.wishes) == ("big", (OutputWish("y", False),))
    assert header.inputs[0].array is not None
    np.testing.assert_array_equal(header.inputs[0].array, image)
    assert peak < 4 * len(text) + (2 << 20)
