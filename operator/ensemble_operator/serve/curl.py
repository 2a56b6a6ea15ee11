"""A `curl` command that asks a served ensemble one row of zeros, whatever its inputs are: one line to paste. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from ensemble_contract.tensors import TensorSpec

# A row of so many numbers still reads well as JSON.
MAX_JSON_ELEMENTS = 16
TOP_CLASSES = 5


def curl_line(url: str, model: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """The command; small inputs as JSON, others with the binary tensor extension of the V2 protocol.

    Of an output with many classes it asks for the best five, by the classification extension.
    """
    endpoint = f"{url}/v2/models/{model}/infer"
    wishes = [_wish(output) for output in outputs]
    if all(tensor.row_elements <= MAX_JSON_ELEMENTS and tensor.datatype != "BF16" for tensor in inputs):
        body = json.dumps({"inputs": [_in_json(tensor) for tensor in inputs], "outputs": wishes}, separators=(",", ":"))
        return f"curl -s {endpoint} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    header = json.dumps({"inputs": [_in_binary(tensor) for tensor in inputs], "outputs": wishes}, separators=(",", ":"))
    size = sum(tensor.row_bytes for tensor in inputs)
    return (
        f"(printf %s {shlex.quote(header)}; head -c {size} /dev/zero) | curl -s {endpoint} --data-binary @- "
        f"-H 'Content-Type: application/octet-stream' -H 'Inference-Header-Content-Length: {len(header.encode())}'"
    )


def _wish(output: TensorSpec) -> dict[str, object]:
    many = len(output.shape) == 1 and output.row_elements > MAX_JSON_ELEMENTS
    return {"name": output.name, **({"parameters": {"classification": TOP_CLASSES}} if many else {})}


def _in_json(tensor: TensorSpec) -> dict[str, object]:
    zero: object = False if tensor.datatype == "BOOL" else 0
    data = [zero] * tensor.row_elements
    return {"name": tensor.name, "shape": [1, *tensor.shape], "datatype": tensor.datatype, "data": data}


def _in_binary(tensor: TensorSpec) -> dict[str, object]:
    return {
        "name": tensor.name,
        "shape": [1, *tensor.shape],
        "datatype": tensor.datatype,
        "parameters": {"binary_data_size": tensor.row_bytes},
    }
