"""Tensor elements as JSON: arrays from `data`, flat or nested, and lists of numbers for answers.

The bytes of `data` that are not numbers, its brackets and commas, are compared with those that the shape demands: this
finds ragged and miscounted data before anything is allocated. The numbers are then decoded some at a time, because
a Python number takes ten times the memory of its element.
"""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np

from ensemble_contract.tensors import FLOATING, TensorSpec
from ensemble_gateway.request import Array, RequestError

_SPACE = b" \t\r\n"
_NUMBER_BYTES = b"0123456789.eE+-" + _SPACE
_BOOL_BYTES = b"truefals" + _SPACE
_CHUNK_BYTES = 1 << 17
_CHUNK_ELEMENTS = 1 << 14

_ENCODER = msgspec.json.Encoder()
_FLOATS = msgspec.json.Decoder(list[float])
_INTEGERS = msgspec.json.Decoder(list[int])
_BOOLS = msgspec.json.Decoder(list[bool])
_INDEX = re.compile(r"\$\[(\d+)\]")


def array_of_json(tensor: str, spec: TensorSpec, shape: tuple[int, ...], data: msgspec.Raw) -> Array:
    """The array of `shape` and of the declared dtype whose elements are the JSON `data`; `tensor` names it in errors.

    Raises RequestError (400) for BF16 (binary only, as in Triton), for data that is neither flat nor nested as the
    shape, and for elements that are no numbers of the datatype or out of its range.
    """
    if spec.datatype == "BF16":
        raise RequestError(400, f"{tensor}: BF16 has no JSON form: send the tensor as binary data")
    text = bytes(data)
    separators = text.translate(None, _BOOL_BYTES if spec.datatype == "BOOL" else _NUMBER_BYTES)
    elements = math.prod(shape)
    # This bounds what is allocated below by the size of the text.
    if separators.count(b",") != elements - 1 or (shape[-1] == 1 and _empty_arrays(text)):
        raise _misshapen(tensor, spec, shape, text, separators)
    nested = separators != b"[" + b"," * (elements - 1) + b"]"
    if nested and separators != _nested_separators(shape):
        raise _misshapen(tensor, spec, shape, text, separators)
    return _decode_chunks(tensor, spec, text, elements, nested).reshape(shape)


def json_of_array(name: str, datatype: str, array: Array) -> msgspec.Raw:
    """The elements of `array` as a flat JSON array; FP16 and FP32 as their exact doubles, as Triton does.

    Raises RequestError (400) for NaN and infinities, which JSON cannot hold.
    """
    if datatype in FLOATING and not np.isfinite(array).all():
        raise RequestError(
            400, f"output {name!r} holds NaN or Infinity, which have no JSON form: request it with binary_data true"
        )
    flat = array.reshape(-1)
    # Some at a time, because nothing else in the process runs while they are written.
    pieces = [_ENCODER.encode(flat[at : at + _CHUNK_ELEMENTS].tolist()) for at in range(0, len(flat), _CHUNK_ELEMENTS)]
    if len(pieces) == 1:
        return msgspec.Raw(pieces[0])
    return msgspec.Raw(b"[" + b",".join([piece[1:-1] for piece in pieces]) + b"]")


def _decode_chunks(tensor: str, spec: TensorSpec, text: bytes, elements: int, nested: bool) -> Array:
    """The elements of the JSON array `text`, a chunk of text at a time, as a flat array."""
    array = np.empty(elements, spec.dtype)
    filled, start, last = 0, 1, len(text) - 1
    while start <= last:
        stop = text.find(b",", start + _CHUNK_BYTES)
        stop = last if stop < 0 else stop
        piece = text[start:stop]
        if nested:
            piece = piece.translate(None, b"[]")
        chunk = _decode_chunk(tensor, spec, b"[" + piece + b"]", filled)
        array[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
        start = stop + 1
    if spec.datatype in FLOATING:
        finite = np.isfinite(array)
        if not finite.all():
            raise RequestError(
                400, f"{tensor}: element {int(finite.argmin())} of data is too large for {spec.datatype}"
            )
    return array


def _decode_chunk(tensor: str, spec: TensorSpec, text: bytes, offset: int) -> Array:
    try:
        if spec.datatype == "BOOL":
            return np.array(_BOOLS.decode(text), spec.dtype)
        if spec.datatype in FLOATING:
            numbers = _FLOATS.decode(text)
            with np.errstate(over="ignore"):
                return np.fromiter(numbers, spec.dtype, len(numbers))
        return _integers(tensor, spec, _INTEGERS.decode(text), offset)
    except msgspec.ValidationError as error:
        found = _INDEX.search(str(error))
        index = offset + int(found[1]) if found else offset
        reason = str(error).replace("`", "").partition(" - at ")[0]
        raise RequestError(400, f"{tensor}: element {index} of data is no {spec.datatype}: {reason.lower()}") from None


def _integers(tensor: str, spec: TensorSpec, numbers: list[int], offset: int) -> Array:
    try:
        return np.fromiter(numbers, spec.dtype, len(numbers))
    except OverflowError:
        limits = np.iinfo(spec.dtype)
        index = next(i for i, number in enumerate(numbers) if not limits.min <= number <= limits.max)
        raise RequestError(
            400, f"{tensor}: element {offset + index} of data is out of the range of {spec.datatype}"
        ) from None


def _empty_arrays(text: bytes) -> int:
    """How many empty arrays `text` has: arrays of one number and of none have the same separators."""
    return text.translate(None, _SPACE).count(b"[]")


def _nested_separators(shape: tuple[int, ...]) -> bytes:
    """Brackets and commas of an array nested as `shape`."""
    level = b""
    for dimension in reversed(shape):
        level = b"[" + b",".join([level] * dimension) + b"]"
    return level


def _misshapen(tensor: str, spec: TensorSpec, shape: tuple[int, ...], text: bytes, separators: bytes) -> RequestError:
    """The error for `data` that is not an array of numbers, flat or nested as `shape`."""
    if not text.startswith(b"["):
        return RequestError(400, f"{tensor}: data must be an array, got {text[:40].decode(errors='replace')}")
    alien = separators.translate(None, b"[],")
    if alien:
        index = text[: text.index(alien[:1])].count(b",")
        wanted = "true or false" if spec.datatype == "BOOL" else "a number"
        return RequestError(400, f"{tensor}: element {index} of data is not {wanted}")
    elements = math.prod(shape)
    found = separators.count(b",") + 1 - _empty_arrays(text)
    if found != elements:
        return RequestError(400, f"{tensor}: data has {found} elements, shape {list(shape)} takes {elements}")
    return RequestError(400, f"{tensor}: data is ragged: it must be flat or nested as its shape {list(shape)}")
