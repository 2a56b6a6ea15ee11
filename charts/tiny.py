"""The network that `helm test` serves: doubled = 2 numbers, four a row, as an ONNX file of a hundred bytes."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

WIDTH = 4


def tiny_network(factor: float = 2.0) -> bytes:
    """The file; equal at every call with the same factor."""
    tensor = helper.make_tensor_value_info
    rows = ("rows", WIDTH)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["numbers", "factor"], ["doubled"])],
        "times",
        [tensor("numbers", TensorProto.FLOAT, rows)],
        [tensor("doubled", TensorProto.FLOAT, rows)],
        [helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor])],
    )
    model = helper.make_model(graph, producer_name="ensemble-operator", opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
