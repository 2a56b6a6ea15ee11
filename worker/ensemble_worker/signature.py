"""What a model file says about its inputs and outputs: names, datatypes, row shapes, and which batches it takes.

Reads files, runs nothing. A `.pt2` file tells all of it and an ONNX file what onnxruntime reports; TorchScript says
nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble_contract.errors import ContractError
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.errors import InvalidModel
from ensemble_worker.inspect_export import inspect_export

if TYPE_CHECKING:
    from pathlib import Path

BATCH_SYMBOL = re.compile(r"(?:Symbol\(')?(\w+)")

# torch._export.serde.schema.ScalarType (schema version 8).
EXPORT_DATATYPES = {
    1: "UINT8", 2: "INT8", 3: "INT16", 4: "INT32", 5: "INT64", 6: "FP16", 7: "FP32", 8: "FP64", 12: "BOOL", 13: "BF16",
    28: "UINT16", 34: "UINT32", 35: "UINT64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Signature:
    """What is known of a model's inputs and outputs; None where the file does not tell.

    `fixed_batch` is the only number of rows the model takes, `max_batch` the largest one of a model with a dynamic
    batch.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[TensorSpec, ...] | None = None
    dynamic_batch: bool | None = None
    fixed_batch: int | None = None
    max_batch: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The signature as `measure` prints it."""
        tensors = {"inputs": self.inputs, "outputs": self.outputs}
        shown: dict[str, Any] = {
            key: None
            if specs is None
            else [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]
            for key, specs in tensors.items()
        }
        return {**shown, "dynamicBatch": self.dynamic_batch, "fixedBatch": self.fixed_batch, "maxBatch": self.max_batch}


def of(path: Path, model_format: str) -> Signature:
    """The signature of a model file.

    Raises InvalidArchive or InvalidModel, saying what is wrong with the file.
    """
    if model_format == "torch-export":
        return of_export(inspect_export(path).program)
    if model_format == "onnx":
        from ensemble_worker.backends import onnx_runtime

        return onnx_runtime.signature(path)
    return Signature()


def of_export(program: dict[str, Any]) -> Signature:
    """The signature of an inspected `.pt2` program.

    Raises InvalidModel if an input or output is not a tensor with a batch as its first dimension.
    """
    module = program["graph_module"]
    metas = module["graph"]["tensor_values"]
    inputs = [s["user_input"]["arg"] for s in module["signature"]["input_specs"] if "user_input" in s]
    outputs = [s["user_output"]["arg"] for s in module["signature"]["output_specs"] if "user_output" in s]
    if any("constant_input" in s for s in module["signature"]["input_specs"]):
        raise InvalidModel(
            "an input is a constant of the export, not a tensor: export a model whose inputs are all tensors"
        )
    batches = {_batch(metas, arg, "input") for arg in inputs}
    fixed = {b for b in batches if b is not None}
    if len(batches) > 1:
        raise InvalidModel(
            "the inputs do not share one batch dimension: mark dimension 0 of every input as the same Dim"
        )
    return Signature(
        inputs=_specs(metas, inputs, [a["as_tensor"]["name"] for a in inputs]),
        outputs=_specs(metas, outputs, _output_names(module, len(outputs))),
        dynamic_batch=not fixed,
        fixed_batch=next(iter(fixed), None),
        max_batch=None if fixed or not inputs else _largest_batch(program, metas[inputs[0]["as_tensor"]["name"]]),
    )


def _largest_batch(program: dict[str, Any], meta: dict[str, Any]) -> int | None:
    """The limit of the symbol that a tensor's first dimension is; None where it is no symbol or has no limit."""
    symbol = BATCH_SYMBOL.match(meta["sizes"][0]["as_expr"]["expr_str"])
    if symbol is None:
        return None
    limit: int | None = program["range_constraints"].get(symbol[1], {}).get("max_val")
    return limit


def _batch(metas: dict[str, Any], arg: dict[str, Any], kind: str) -> int | None:
    """The fixed batch of a tensor, None if it is dynamic."""
    if "as_tensor" not in arg:
        raise InvalidModel(f"an {kind} is not a tensor")
    name = arg["as_tensor"]["name"]
    sizes = metas[name]["sizes"]
    if not sizes:
        raise InvalidModel(f"{kind} {name!r} has no batch dimension")
    size: int | None = sizes[0].get("as_int")
    return size


def _specs(metas: dict[str, Any], args: list[dict[str, Any]], names: list[str]) -> tuple[TensorSpec, ...] | None:
    specs = []
    for arg, name in zip(args, names, strict=True):
        _batch(metas, arg, "output")
        meta = metas[arg["as_tensor"]["name"]]
        shape = [size.get("as_int") for size in meta["sizes"][1:]]
        datatype = EXPORT_DATATYPES.get(meta["dtype"])
        if datatype is None:
            raise InvalidModel(f"tensor {name!r} has a datatype that the V2 protocol does not know")
        if any(size is None for size in shape):
            return None
        try:
            specs.append(TensorSpec(name, datatype, tuple(size for size in shape if size is not None)))
        except ContractError as error:
            raise InvalidModel(str(error)) from error
    return tuple(specs)


def _output_names(module: dict[str, Any], count: int) -> list[str]:
    """The keys of a dict of outputs, else `output`, or `output_0` and so on: a graph's own names mean nothing."""
    call = next((c for c in module["module_call_graph"] if c["fqn"] == ""), None)
    if call is not None and call["signature"] is not None:
        tree = json.loads(call["signature"]["out_spec"])[1]
        if tree["type"] in ("builtins.dict", "collections.OrderedDict"):
            keys: list[str] = json.loads(tree["context"])
            if len(keys) == count and all(isinstance(k, str) for k in keys):
                return keys
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
