"""An inspected `.pt2` program as an fx graph, read without torch.export: a fifth of its time, and no `eval`.

torch.export.load imports torch's compiler and evaluates every symbolic size, which serving has no use for. This reader
knows version 8 of the format (torch/_export/serde/schema.py) and what inference programs are made of: numeric
operators, arithmetic of sizes, plain tensors. Programs with more than that are left to torch.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ensemble_worker.backends.tensors import DTYPES
from ensemble_worker.errors import InvalidArchive
from ensemble_worker.inspect_export import CONFIGS, PROGRAM, InspectedExport
from ensemble_worker.signature import EXPORT_DATATYPES

SCHEMA_MAJOR = 8
POSITIONAL, KEYWORD = 1, 2
SCALAR_TYPES = {number: DTYPES[name] for number, name in EXPORT_DATATYPES.items()}
LAYOUTS = {7: torch.strided}
MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
SCALAR_MODULES = {"_operator": operator, "math": math, "torch": torch}
# It compares a tensor with what the export saw: a check of the exporter's assumptions, at every call.
DROPPED = frozenset({"torch.ops.aten._assert_tensor_metadata.default"})


class NotCovered(Exception):
    """The program has a part that only torch.export.load knows; the message says which."""


def read(inspected: InspectedExport, device: torch.device) -> fx.GraphModule:
    """A function of the flat inputs that gives the flat outputs as a tuple, its weights on `device`.

    Devices that the program names become `device`. Raises NotCovered, and InvalidArchive for weights that do not fit
    their description.
    """
    program = inspected.program
    if program["schema_version"]["major"] != SCHEMA_MAJOR:
        raise NotCovered(f"schema version {program['schema_version']['major']}")
    module = program["graph_module"]
    try:
        reader = _Reader(_Tensors(inspected, device), device)
        reader.add_inputs(module["signature"]["input_specs"])
        for node in module["graph"]["nodes"]:
            if node["target"] not in DROPPED:
                reader.add_node(node)
        return reader.finish(module["signature"]["output_specs"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise NotCovered(f"{PROGRAM}: {error!r}") from error


class _Tensors:
    """The archive's weights and constants by name; names of one record share its memory."""

    def __init__(self, inspected: InspectedExport, device: torch.device) -> None:
        self._archive = inspected.archive
        self._device = device
        self._described = {
            name: (folder + payload["path_name"], payload["tensor_meta"])
            for folder, config in CONFIGS.items()
            for name, payload in json.loads(self._archive.read(config))["config"].items()
        }
        self._records: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor:
        """The tensor of this name. Raises InvalidArchive if its record does not hold it."""
        record, meta = self._described[name]
        dtype = SCALAR_TYPES[meta["dtype"]]
        if meta["layout"] not in LAYOUTS:
            raise NotCovered(f"{name} is not a strided tensor")
        sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        try:
            tensor = self._flat(record, dtype).as_strided(sizes, strides, meta["storage_offset"]["as_int"])
        except RuntimeError as error:
            raise InvalidArchive(f"{record} does not hold a tensor of shape {sizes}: {error}") from error
        return tensor

    def _flat(self, record: str, dtype: torch.dtype) -> torch.Tensor:
        key = (record, dtype)
        if key not in self._records:
            self._records[key] = self._read(record).view(dtype).to(self._device)
        return self._records[key]

    def _read(self, name: str) -> torch.Tensor:
        """A record's bytes in memory of torch's own, which is aligned as its kernels like it."""
        record = self._archive.records[name]
        if record.deflated:
            return torch.frombuffer(bytearray(self._archive.read(name)), dtype=torch.uint8)
        host = torch.empty(record.size, dtype=torch.uint8)
        with self._archive.path.open("rb") as file:
            file.seek(record.offset)
            if file.readinto(host.numpy().data) != record.size:
                raise InvalidArchive(f"{name} ends early: the file was truncated while it was read")
        return host


class _Reader:
    """Builds the graph node by node; values by the names that the program gives them."""

    def __init__(self, tensors: _Tensors, device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._root = torch.nn.Module()
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}

    def add_inputs(self, specs: list[dict[str, Any]]) -> None:
        """User inputs become placeholders, weights and constants attributes."""
        held: list[tuple[str, torch.Tensor]] = []
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind == "user_input":
                name = content["arg"]["as_tensor"]["name"]
                self._values[name] = self._graph.placeholder(f"input_{len(self._values)}")
            elif kind in ("parameter", "buffer"):
                held.append((content["arg"]["name"], self._tensors.get(content[f"{kind}_name"])))
            elif kind == "tensor_constant":
                held.append((content["arg"]["name"], self._tensors.get(content["tensor_constant_name"])))
            else:
                raise NotCovered(f"an input that is a {kind}")
        for number, (name, tensor) in enumerate(held):
            self._root.register_buffer(f"held_{number}", tensor)
            self._values[name] = self._graph.get_attr(f"held_{number}")

    def add_node(self, node: dict[str, Any]) -> None:
        """One call of an operator or of arithmetic, and the names of what it gives."""
        target = _target(node["target"])
        args, kwargs = self._arguments(node["inputs"], target)
        made = self._graph.call_function(target, args, kwargs)
        if node["outputs"]:
            self._name_outputs(node["outputs"], made)

    def finish(self, specs: list[dict[str, Any]]) -> fx.GraphModule:
        """The module whose outputs these are. Raises NotCovered for programs that also change their buffers."""
        outputs = []
        for spec in specs:
            ((kind, content),) = spec.items()
            if kind != "user_output":
                raise NotCovered(f"an output that is a {kind}")
            outputs.append(self._values[content["arg"]["as_tensor"]["name"]])
        self._graph.output(tuple(outputs))
        return fx.GraphModule(self._root, self._graph)

    def _arguments(
        self, inputs: list[dict[str, Any]], target: Callable[..., Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments; an operator's positional ones must be the first of its schema."""
        if not isinstance(target, torch._ops.OpOverload):
            return tuple(self._argument(given["arg"]) for given in inputs), {}
        positional = [given for given in inputs if given["kind"] == POSITIONAL]
        named = [given for given in inputs if given["kind"] == KEYWORD]
        schema = [argument.name for argument in target._schema.arguments]
        if [given["name"] for given in positional] != schema[: len(positional)]:
            raise NotCovered(f"{target}: arguments in another order than its schema")
        if len(positional) + len(named) != len(inputs) or any(keyword.iskeyword(given["name"]) for given in named):
            raise NotCovered(f"{target}: arguments of a kind that is not known")
        return (
            tuple(self._argument(given["arg"]) for given in positional),
            {given["name"]: self._argument(given["arg"]) for given in named},
        )

    def _argument(self, argument: dict[str, Any]) -> Any:
        ((kind, value),) = argument.items()
        if kind not in self._ARGUMENTS:
            raise NotCovered(f"an argument that is {kind}")
        return self._ARGUMENTS[kind](self, value)

    def _size(self, value: dict[str, Any]) -> Any:
        """A size: a number, or the name of one that was computed."""
        return self._values[value["as_name"]] if "as_name" in value else value["as_int"]

    def _optional(self, value: dict[str, Any]) -> fx.Node | None:
        return self._values[value["as_tensor"]["name"]] if "as_tensor" in value else None

    _ARGUMENTS: dict[str, Callable[[_Reader, Any], Any]] = {  # noqa: RUF012  # a constant table of unbound functions
        "as_none": lambda _, __: None,
        "as_tensor": lambda self, value: self._values[value["name"]],
        "as_tensors": lambda self, value: [self._values[one["name"]] for one in value],
        "as_optional_tensor": lambda self, value: self._optional(value),
        "as_optional_tensors": lambda self, value: [self._optional(one) for one in value],
        "as_int": lambda _, value: int(value),
        "as_ints": lambda _, value: [int(one) for one in value],
        "as_float": lambda _, value: float(value),
        "as_floats": lambda _, value: [float(one) for one in value],
        "as_bool": lambda _, value: bool(value),
        "as_bools": lambda _, value: [bool(one) for one in value],
        "as_string": lambda _, value: str(value),
        "as_sym_int": lambda self, value: self._size(value),
        "as_sym_ints": lambda self, value: [self._size(one) for one in value],
        "as_scalar_type": lambda _, value: SCALAR_TYPES[value],
        "as_memory_format": lambda _, value: MEMORY_FORMATS[value],
        "as_layout": lambda _, value: LAYOUTS[value],
        "as_device": lambda self, _: self._device,
    }

    def _name_outputs(self, outputs: list[dict[str, Any]], made: fx.Node) -> None:
        """A single result is the call itself; of several, or of a list, each is an item of it."""
        if len(outputs) == 1 and "as_tensors" in outputs[0]:
            names: list[str | None] = [one["name"] for one in outputs[0]["as_tensors"]]
        else:
            names = [_name(*next(iter(output.items()))) for output in outputs]
            if len(names) == 1 and names[0] is not None:
                self._values[names[0]] = made
                return
        for index, name in enumerate(names):
            if name is not None:
                self._values[name] = self._graph.call_function(operator.getitem, (made, index))


def _name(kind: str, value: Any) -> str | None:
    """The name of one result, None for one that the operator leaves out."""
    if kind == "as_none":
        return None
    if kind not in ("as_tensor", "as_sym_int"):
        raise NotCovered(f"a result that is {kind}")
    name: str = value["name" if kind == "as_tensor" else "as_name"]
    return name


def _target(text: str) -> Callable[..., Any]:
    """The operator or the function of sizes that the inspection has let through."""
    root, _, rest = text.partition(".")
    if not text.startswith("torch.ops."):
        found: Callable[..., Any] = getattr(SCALAR_MODULES[root], rest)
        return found
    if text.startswith("torch.ops.higher_order."):
        raise NotCovered(text)
    namespace, name, overload = text.removeprefix("torch.ops.").split(".", 2)
    operation: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return operation
