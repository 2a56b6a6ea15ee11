"""The command that users paste: what the shell makes of it is a valid V2 body."""

import json
import shlex
import subprocess

import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.serve.curl import curl_line

SMALL = TensorSpec("x", "FP32", (4,))
FLAG = TensorSpec("it's on", "BOOL", ())
IMAGE = TensorSpec("image", "UINT8", (3, 20, 20))
HALF = TensorSpec("h", "BF16", (2,))
FEW = TensorSpec("y", "FP32", (3,))
MANY = TensorSpec("p", "FP32", (1000,))


def test_small_inputs_are_json() -> None:
    words = shlex.split(curl_line("http://h:1", "m", (SMALL, FLAG), (FEW, MANY)))
    assert words[:3] == ["curl", "-s", "http://h:1/v2/models/m/infer"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["inputs"] == [
        {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0, 0, 0, 0]},
        {"name": "it's on", "shape": [1], "datatype": "BOOL", "data": [False]},
    ]
    assert body["outputs"] == [{"name": "y"}, {"name": "p", "parameters": {"classification": 5}}]


@pytest.mark.parametrize("inputs", [(IMAGE,), (SMALL, IMAGE, FLAG), (HALF,)])
def test_others_are_binary_and_the_shell_makes_exactly_that_body(inputs: tuple[TensorSpec, ...]) -> None:
    line = curl_line("http://h:1", "m", inputs, (MANY,))
    assert "\n" not in line
    produce, consume = line.split(" | curl ")
    body = subprocess.run(["sh", "-c", produce], capture_output=True, check=True, timeout=10).stdout
    length = int(consume.split("Inference-Header-Content-Length: ")[1].rstrip("'"))
    header = json.loads(body[:length])
    sizes = [tensor["parameters"]["binary_data_size"] for tensor in header["inputs"]]
    assert sizes == [tensor.row_bytes for tensor in inputs]
    assert body[length:] == bytes(sum(sizes))
