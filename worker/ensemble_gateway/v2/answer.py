"""The V2 body of an answer: its JSON head and its binary outputs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from ensemble_contract.tensors import TensorSpec, bf16_to_fp32
from ensemble_gateway.request import Answer, Array, InferHeader, OutputWish
from ensemble_gateway.v2.elements import json_of_array


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """A body in pieces: `json`, then `binary`. `header_length` is the length of `json` if binary outputs follow it."""

    json: bytes
    binary: list[memoryview | bytes]
    header_length: int | None


class _OutputHead(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: msgspec.Raw | list[str] | None = None


class _AnswerHead(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str = ""
    model_name: str
    model_version: str
    parameters: dict[str, str] | None = None
    outputs: list[_OutputHead]


_JSON = msgspec.json.Encoder()


def answer_prefix(header: InferHeader, rows: int, used_all: bool) -> bytes | None:
    """The JSON head of the answer of `rows` rows, where it is the same for every answer to `header`, else None.

    It is so when all outputs are whole and binary and every member answered (`used_all`). The outputs follow as
    `binary_sizes` lists them.
    """
    if not used_all or header.members:
        return None
    asked = _asked(header)
    if not all(wish.binary and not wish.classes for _, wish in asked):
        return None
    return _head_text(header, [_binary_head(spec.name, spec, rows, rows * spec.row_bytes) for spec, _ in asked])


def binary_sizes(header: InferHeader, rows: int) -> dict[str, int]:
    """The bytes of each output of `rows` rows, by name, in the order of the answer, if sent whole and binary."""
    return {spec.name: rows * spec.row_bytes for spec, _ in _asked(header)}


def encode_answer(header: InferHeader, answer: Answer) -> EncodedAnswer:
    """The body that answers `header`: its outputs as the client wished them, binary ones without a copy.

    With `members` asked, each wished output is followed by `<member>.<output>` of the members used, in the same form.
    Outputs of members that did not answer (rule `none`) are left out, and `members_missing` names these members.

    Raises RequestError (400) where an output wished as JSON holds NaN or an infinity.
    """
    heads: list[_OutputHead] = []
    binary: list[memoryview | bytes] = []
    tail: memoryview | bytes
    for name, spec, wish, array in _answered(header, answer):
        if wish.classes:
            head, tail = _classified(header, name, spec, wish, array)
        elif wish.binary:
            head, tail = _binary_head(name, spec, len(array), array.nbytes), _bytes_of(array)
        else:
            head = _OutputHead(name, spec.datatype, array.shape, data=json_of_array(name, spec.datatype, array))
            tail = b""
        heads.append(head)
        if wish.binary:
            binary.append(tail)
    parameters = None
    if answer.missing or header.members:
        parameters = {"members_used": ",".join(answer.used), "members_missing": ",".join(answer.missing)}
    text = _head_text(header, heads, parameters)
    return EncodedAnswer(text, binary, len(text) if binary else None)


def error_body(message: str) -> bytes:
    """V2's error object."""
    return _JSON.encode({"error": message})


def _asked(header: InferHeader) -> list[tuple[TensorSpec, OutputWish]]:
    """The outputs that the answer shall have, in its order."""
    outputs = header.model.outputs
    if not header.wishes:
        return [(spec, OutputWish(spec.name, header.binary_default)) for spec in outputs]
    specs = {spec.name: spec for spec in outputs}
    return [(specs[wish.name], wish) for wish in header.wishes]


def _answered(header: InferHeader, answer: Answer) -> list[tuple[str, TensorSpec, OutputWish, Array]]:
    """The outputs that the answer has, each with its name in it."""
    found = []
    members = answer.used if header.members else ()
    for spec, wish in _asked(header):
        for name in (spec.name, *(f"{member}.{spec.name}" for member in members)):
            array = answer.outputs.get(name)
            if array is not None:
                found.append((name, spec, wish, array))
    return found


def _binary_head(name: str, spec: TensorSpec, rows: int, size: int) -> _OutputHead:
    return _OutputHead(name, spec.datatype, (rows, *spec.shape), {"binary_data_size": size})


def _head_text(header: InferHeader, outputs: list[_OutputHead], parameters: dict[str, str] | None = None) -> bytes:
    model = header.model
    return _JSON.encode(
        _AnswerHead(
            id=header.id, model_name=model.name, model_version=model.version, parameters=parameters, outputs=outputs
        )
    )


def _classified(
    header: InferHeader, name: str, spec: TensorSpec, wish: OutputWish, array: Array
) -> tuple[_OutputHead, bytes]:
    """The best classes of every row as BYTES of shape (rows, classes): in the head, or in binary form after it."""
    values = bf16_to_fp32(array) if spec.datatype == "BF16" else array
    texts = _best_classes(values.reshape(len(array), -1), wish.classes, header.model.labels.get(spec.name, ()))
    shape = (len(texts), len(texts[0]))
    if not wish.binary:
        return _OutputHead(name, "BYTES", shape, data=[text for row in texts for text in row]), b""
    encoded = [text.encode() for row in texts for text in row]
    tail = b"".join([len(text).to_bytes(4, "little") + text for text in encoded])
    return _OutputHead(name, "BYTES", shape, {"binary_data_size": len(tail)}), tail


def _best_classes(values: Array, classes: int, labels: tuple[str, ...]) -> list[list[str]]:
    """`value:index` or `value:index:label`, best first, ties to the lowest index, for each row of `values` (rows, n).

    Values are written as C++'s std::to_string does, which is Triton's form: %f for floats.
    """
    last = values.shape[1] - 1
    # A stable ascending sort of the mirrored row, read backwards, leaves the lowest index first among equals;
    # negating instead would overflow unsigned datatypes.
    order = last - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :classes]
    best = np.take_along_axis(values, order, axis=1).tolist()
    form = "%f:%d" if values.dtype.kind == "f" else "%d:%d"
    suffixes = [f":{label}" for label in labels]
    return [
        [form % (value, i) + (suffixes[i] if i < len(suffixes) else "") for value, i in zip(row, indices, strict=True)]
        for row, indices in zip(best, order.tolist(), strict=True)
    ]


def _bytes_of(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
