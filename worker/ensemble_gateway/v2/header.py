"""The JSON part of an infer request, checked against the model it asks: everything but the binary tensors."""

from __future__ import annotations

from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.request import InferHeader, InputPart, Model, OutputWish, RequestError
from ensemble_gateway.v2.elements import array_of_json
from ensemble_gateway.v2.wire import (
    ABSENT,
    SharedMemory,
    WireInput,
    WireOutput,
    WireParameters,
    decode_request,
    decode_shape,
)

_NO_PARAMETERS = WireParameters()
_NOT_IN_USE = frozenset({b"", b"0", b'""', b"false", b"null"})


def parse_header(model: Model, text: bytes, binary_bytes: int, *, max_rows: int) -> InferHeader:
    """The request in `text`, the JSON part of a body that has `binary_bytes` bytes of binary tensors after it.

    An empty text is Triton's raw binary request: the whole body is the rows of the model's only input, and all outputs
    are binary. The result depends on the arguments alone; without JSON tensors it holds no array and is small.

    Raises RequestError: 400 naming what contradicts the model, 413 for more than `max_rows` rows.
    """
    if not text:
        return _raw_request(model, binary_bytes, max_rows)
    request = decode_request(text)
    parameters = request.parameters or _NO_PARAMETERS
    _refuse_sequences(parameters)
    rows, inputs = _inputs(model, request.inputs, binary_bytes, max_rows)
    binary = parameters.binary_data_output
    if request.outputs:
        wishes = _wishes(model, request.outputs, binary)
    else:
        wishes = ()
        if not binary:
            for spec in model.outputs:
                _require_json_form(spec)
    timeout = parameters.timeout
    return InferHeader(
        model=model,
        rows=rows,
        inputs=inputs,
        wishes=wishes,
        binary_default=binary,
        id=request.id,
        timeout_s=None if timeout is None else timeout / 1e6,
        quorum=parameters.quorum,
        members=parameters.members,
    )


def _inputs(
    model: Model, wires: list[WireInput], binary_bytes: int, max_rows: int
) -> tuple[int, tuple[InputPart, ...]]:
    """The rows and the inputs, in the model's order; binary parts lie in the order in which the client lists them."""
    specs = {spec.name: spec for spec in model.inputs}
    parts: dict[str, InputPart] = {}
    rows = offset = 0
    for wire in wires:
        spec = specs.get(wire.name)
        if spec is None:
            known = ", ".join(specs)
            raise RequestError(400, f"unknown input {_shown(wire.name)}: model {model.name!r} has the inputs {known}")
        label = f"input {spec.name!r}"
        if spec.name in parts:
            raise RequestError(400, f"{label} is given twice")
        shape = _shape(label, spec, wire, max_rows)
        if parts and shape[0] != rows:
            raise RequestError(400, f"{label}: {shape[0]} rows, but input {wires[0].name!r} has {rows}")
        rows = shape[0]
        part = _part(label, spec, wire, shape, offset)
        parts[spec.name] = part
        if part.array is None:
            offset = part.stop
    missing = [name for name in specs if name not in parts]
    if missing:
        raise RequestError(400, f"input {missing[0]!r} is missing: model {model.name!r} needs {', '.join(specs)}")
    if offset != binary_bytes:
        raise RequestError(
            400, f"the binary part of the body has {binary_bytes} bytes, the inputs' binary_data_size sum to {offset}"
        )
    return rows, tuple([parts[name] for name in specs])


def _shape(label: str, spec: TensorSpec, wire: WireInput, max_rows: int) -> tuple[int, ...]:
    """The shape of an input, of its model's form and with an admissible number of rows."""
    if wire.datatype != spec.datatype:
        raise RequestError(400, f"{label}: datatype {_shown(wire.datatype)} does not match {spec.datatype}")
    shape = tuple(decode_shape(label, wire.shape))
    if not shape or shape[1:] != spec.shape:
        wanted = ", ".join(["rows", *map(str, spec.shape)])
        raise RequestError(400, f"{label}: shape {list(shape)} does not match [{wanted}]")
    _check_rows(label, shape[0], max_rows)
    return shape


def _part(label: str, spec: TensorSpec, wire: WireInput, shape: tuple[int, ...], offset: int) -> InputPart:
    """Where an input's rows are: at `offset` in the binary part, or in the JSON."""
    size = None
    if wire.parameters is not None:
        _refuse_shared_memory(label, wire.parameters)
        size = wire.parameters.binary_data_size
    if size is None:
        if wire.data == ABSENT:
            raise RequestError(400, f"{label} has neither data nor the parameter binary_data_size")
        return InputPart(array=array_of_json(label, spec, shape, wire.data))
    if wire.data != ABSENT:
        raise RequestError(400, f"{label} has both data and the parameter binary_data_size")
    wanted = shape[0] * spec.row_bytes
    if size != wanted:
        raise RequestError(
            400,
            f"{label}: binary_data_size {size} does not match shape {list(shape)} of {spec.datatype}, "
            f"which takes {wanted} bytes",
        )
    return InputPart(offset, offset + size)


def _wishes(model: Model, wires: list[WireOutput], binary_default: bool) -> tuple[OutputWish, ...]:
    specs = {spec.name: spec for spec in model.outputs}
    wishes: dict[str, OutputWish] = {}
    for wire in wires:
        spec = specs.get(wire.name)
        if spec is None:
            known = ", ".join(specs)
            raise RequestError(400, f"unknown output {_shown(wire.name)}: model {model.name!r} has the outputs {known}")
        if spec.name in wishes:
            raise RequestError(400, f"output {spec.name!r} is requested twice")
        binary, classes = binary_default, 0
        if wire.parameters is not None:
            _refuse_shared_memory(f"output {spec.name!r}", wire.parameters)
            classes = wire.parameters.classification
            if wire.parameters.binary_data is not None:
                binary = wire.parameters.binary_data
        if classes and spec.datatype == "BOOL":
            raise RequestError(400, f"output {spec.name!r}: classification is not possible for BOOL")
        if not binary and not classes:
            _require_json_form(spec)
        wishes[spec.name] = OutputWish(spec.name, binary, classes)
    return tuple(wishes.values())


def _raw_request(model: Model, binary_bytes: int, max_rows: int) -> InferHeader:
    if binary_bytes == 0:
        raise RequestError(400, "the body is empty: it must hold the JSON of an infer request")
    if len(model.inputs) != 1:
        known = ", ".join(spec.name for spec in model.inputs)
        raise RequestError(400, f"a body without JSON is only possible for models with one input, not {known}")
    spec = model.inputs[0]
    rows, rest = divmod(binary_bytes, spec.row_bytes)
    if rest:
        raise RequestError(
            400, f"input {spec.name!r}: {binary_bytes} bytes are not a whole number of rows of {spec.row_bytes} bytes"
        )
    _check_rows(f"input {spec.name!r}", rows, max_rows)
    return InferHeader(model, rows, (InputPart(0, binary_bytes),), binary_default=True)


def _check_rows(label: str, rows: int, max_rows: int) -> None:
    if rows < 1:
        raise RequestError(400, f"{label}: {rows} rows: a request has at least one")
    if rows > max_rows:
        raise RequestError(
            413, f"{label}: {rows} rows are over the limit of {max_rows} rows a request: send fewer at once"
        )


def _require_json_form(spec: TensorSpec) -> None:
    if spec.datatype == "BF16":
        raise RequestError(400, f"output {spec.name!r}: BF16 has no JSON form: request it with binary_data true")


def _refuse_shared_memory(label: str, parameters: SharedMemory) -> None:
    if parameters.shared_memory_region != ABSENT:
        raise RequestError(400, f"{label}: shared memory regions are not served: send and request tensors in the body")


def _refuse_sequences(parameters: WireParameters) -> None:
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if bytes(getattr(parameters, name)) not in _NOT_IN_USE:
            raise RequestError(400, f"parameters.{name}: sequences are not served: every request stands alone")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
