"""The JSON of an infer request as typed structs, decoded within bounded memory.

Fields that a client can make large, and fields that only need to be noticed, stay raw bytes of the text.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from ensemble_gateway.request import RequestError

MAX_HEADER_BYTES = 256 << 10
"""Bound of the JSON without its tensors: names, shapes and parameters of a thousand outputs fit several times."""

MAX_OBJECTS = 16_384

ABSENT = msgspec.Raw(b"")

Positive = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class SharedMemory(msgspec.Struct, gc=False):
    """What names a shared memory region in the parameters of a tensor."""

    shared_memory_region: msgspec.Raw = ABSENT
    shared_memory_byte_size: msgspec.Raw = ABSENT
    shared_memory_offset: msgspec.Raw = ABSENT


class WireInputParameters(SharedMemory, gc=False):
    """Parameters of an input; others are ignored, as V2 servers do."""

    binary_data_size: Natural | None = None


class WireInput(msgspec.Struct, gc=False):
    """One element of `inputs`."""

    name: str
    datatype: str
    shape: msgspec.Raw
    parameters: WireInputParameters | None = None
    data: msgspec.Raw = ABSENT


class WireOutputParameters(SharedMemory, gc=False):
    """Parameters of a requested output; others are ignored."""

    binary_data: bool | None = None
    classification: Natural = 0


class WireOutput(msgspec.Struct, gc=False):
    """One element of `outputs`."""

    name: str
    parameters: WireOutputParameters | None = None


class WireParameters(msgspec.Struct, gc=False):
    """Parameters of the request; others are ignored. `timeout` is in microseconds."""

    timeout: Positive | None = None
    quorum: Positive | None = None
    members: bool = False
    binary_data_output: bool = False
    sequence_id: msgspec.Raw = ABSENT
    sequence_start: msgspec.Raw = ABSENT
    sequence_end: msgspec.Raw = ABSENT


class WireRequest(msgspec.Struct, gc=False):
    """The JSON object of an infer request."""

    inputs: list[WireInput]
    id: str = ""
    outputs: list[WireOutput] | None = None
    parameters: WireParameters | None = None


class _CoarseInput(msgspec.Struct, omit_defaults=True, gc=False):
    name: msgspec.Raw = ABSENT
    datatype: msgspec.Raw = ABSENT
    shape: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT
    data: msgspec.Raw = ABSENT


class _CoarseRequest(msgspec.Struct, omit_defaults=True, gc=False):
    inputs: list[_CoarseInput]
    id: msgspec.Raw = ABSENT
    outputs: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT


_REQUEST = msgspec.json.Decoder(WireRequest)
_COARSE = msgspec.json.Decoder(_CoarseRequest)
_SHAPE = msgspec.json.Decoder(list[int])


def decode_request(text: bytes) -> WireRequest:
    """The request in `text`.

    Raises RequestError (400) naming the field that is malformed or of the wrong type.
    """
    try:
        return _REQUEST.decode(text) if len(text) <= MAX_HEADER_BYTES else _decode_large(text)
    except msgspec.ValidationError as error:
        raise RequestError(400, f"the request's JSON: {_located(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        hint = ""
        if b"NaN" in text or b"Infinity" in text:
            hint = " (NaN and Infinity have no JSON form: send the tensor as binary data)"
        raise RequestError(400, f"the request's JSON cannot be read: {error}{hint}") from None
    except RecursionError:
        raise RequestError(400, "the request's JSON is nested too deeply") from None


def decode_shape(tensor: str, text: msgspec.Raw) -> list[int]:
    """The dimensions in `text`; `tensor` names their owner in errors.

    Raises RequestError (400) if they are not a short list of integers.
    """
    raw = bytes(text)
    if len(raw) > 512:
        raise RequestError(400, f"{tensor}: shape has more dimensions than any tensor here")
    try:
        return _SHAPE.decode(raw)
    except msgspec.DecodeError:
        raise RequestError(400, f"{tensor}: shape must be a list of integers, got {raw.decode()[:80]}") from None


def _decode_large(text: bytes) -> WireRequest:
    """Decode a text whose size is in its tensors' data; anything else that is large is refused, not decoded.

    One pass leaves every field raw; the text without the data is then small enough for the typed decoder.
    """
    if text.count(b"{") > MAX_OBJECTS:
        raise RequestError(400, f"the request's JSON has more than {MAX_OBJECTS} objects")
    coarse = _COARSE.decode(text)
    tensors = [part.data for part in coarse.inputs]
    for part in coarse.inputs:
        part.data = ABSENT
    header = msgspec.json.encode(coarse)
    if len(header) > MAX_HEADER_BYTES:
        raise RequestError(
            400, f"the request's JSON without its tensors has {len(header)} bytes, over the limit of {MAX_HEADER_BYTES}"
        )
    request = _REQUEST.decode(header)
    for wire, tensor in zip(request.inputs, tensors, strict=True):
        wire.data = tensor
    return request


def _located(error: msgspec.ValidationError) -> str:
    message, _, path = str(error).replace("`", "").partition(" - at $")
    where = path.lstrip(".")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else f"{message[0].lower()}{message[1:]}"
