"""What of a `.pt2` archive (torch.export.save) may be given to torch.export.load: its graph and its plain tensors.

torch.export.load would also unpickle example inputs, custom objects, tensor subclasses and weights of older formats,
load shared libraries, compile guards with `exec`, evaluate symbolic shapes with `eval` (sympy.sympify), and call any
Python function below `torch` that a node names (torch 2.13: torch/export/pt2_archive/_package.py,
torch/export/_unlift.py, torch/_export/serde/serialize.py, torch/utils/_pytree.py). So example inputs, guards and
debug metadata are left out, tensors and names are checked against what torch.export.save writes, and everything else
is refused. Pure but for reading the file.
"""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble_worker.archive import Archive, ArchiveView, open_archive
from ensemble_worker.errors import InvalidArchive

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = "models/model.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
CONFIGS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
FRAME = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})
PLAIN_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
IGNORED = re.compile(r"extra/.*|\.data/.*")

# Operators by what they may do: numeric ones of torch and of torchvision. `from_file` and `save` open any path.
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized|quantized_decomposed|onednn|torchvision)\.([A-Za-z_]\w*)\.(\w+)"
)
FILE_OPERATORS = frozenset({"from_file", "save"})
CONTROL_FLOW = re.compile(
    r"torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
)
SCALAR_FUNCTION = re.compile(
    r"math\.[a-z]\w*|torch\.(sym_[a-z]\w*|_sym_[a-z]\w*)|_operator\.(abs|add|and_|eq|floordiv|ge|getitem|gt|index|invert|le|"
    r"lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub|truediv|xor)"
)
TREE_TYPES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
SHAPE_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "Eq", "Ne",
        "Equality", "Unequality", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "LessThan", "StrictGreaterThan",
        "GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair", "Tuple", "floor", "ceiling", "FloorDiv",
        "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift",
        "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator",
        "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    }
)  # fmt: skip
SHAPE_NAME = re.compile(r"[a-z]{1,3}\d*|true|false|oo|int_oo")
SHAPE_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
MAX_SHAPE_TEXT = 4096


@dataclass(frozen=True, slots=True)
class InspectedExport:
    """A `.pt2` file of which every part that torch will see was inspected; `program` is its models/model.json."""

    archive: Archive
    program: dict[str, Any]
    kept: tuple[str, ...]

    def view(self) -> ArchiveView:
        """The archive to give to torch.export.load."""
        given = {PROGRAM: json.dumps(self.program).encode(), SAMPLE_INPUTS: b""}
        return ArchiveView(self.archive, self.kept, given)


def inspect_export(path: Path) -> InspectedExport:
    """Inspect a `.pt2` file.

    Raises InvalidArchive naming the part that is damaged, missing, or would be unpickled or executed.
    """
    archive = open_archive(path)
    kept = [name for name in archive.records if _is_kept(name)]
    if PROGRAM not in archive.records:
        raise InvalidArchive(f"{PROGRAM} is missing: not written by torch.export.save of torch 2.9 or later")
    archive.verify(kept)
    program = _json(archive, PROGRAM)
    try:
        for folder, config in CONFIGS.items():
            _check_payloads(archive, folder, _json(archive, config)["config"])
        _check(program, PROGRAM)
        _check_signature(program["graph_module"]["signature"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidArchive(f"{PROGRAM} is not what torch.export.save writes: {error!r}") from error
    except RecursionError as error:
        raise InvalidArchive(f"{PROGRAM} is nested too deeply") from error
    program["guards_code"] = []
    return InspectedExport(archive, program, tuple(kept))


def _is_kept(name: str) -> bool:
    """Whether a record is passed on. Of the others, those that torch would read are refused."""
    if name in FRAME or name in CONFIGS.values() or PLAIN_TENSOR.fullmatch(name):
        return True
    if name in (PROGRAM, SAMPLE_INPUTS) or IGNORED.fullmatch(name):
        return False
    if name.startswith("models/"):
        raise InvalidArchive(f"{name}: a file must hold one model, named 'model'")
    if name.startswith("data/aotinductor/"):
        raise InvalidArchive(f"{name}: compiled code is refused; save the model with torch.export.save")
    raise InvalidArchive(f"{name}: this part would be unpickled or is unknown, and is refused; save plain tensors only")


def _json(archive: Archive, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:
        raise InvalidArchive(f"{name} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidArchive(f"{name} is not a JSON object")
    return parsed


def _check_payloads(archive: Archive, folder: str, config: dict[str, Any]) -> None:
    """Tensors must be plain ones, and one without bytes must be empty: torch would allocate any size for it."""
    for tensor, payload in config.items():
        name = folder + payload["path_name"]
        if payload["use_pickle"] or not PLAIN_TENSOR.fullmatch(name) or payload["tensor_meta"] is None:
            raise InvalidArchive(f"{tensor} in {name} would be unpickled, and is refused; save plain tensors only")
        if name not in archive.records:
            raise InvalidArchive(f"{name} is missing: the file is truncated")
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        if archive.records[name].size == 0 and math.prod(sizes) != 0:
            raise InvalidArchive(f"{name} has no bytes for a tensor of shape {sizes}")


def _check_signature(signature: dict[str, Any]) -> None:
    for spec in signature["input_specs"]:
        if "custom_obj" in spec:
            raise InvalidArchive(f"{PROGRAM}: a custom object among the inputs would be unpickled, and is refused")


def _check(part: Any, where: str) -> None:
    """Walk the program: what torch would resolve, evaluate or import must be harmless; debug metadata is cleared."""
    if isinstance(part, list):
        for item in part:
            _check(item, where)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == "metadata" and "target" in part:
            part[key] = {}
        elif key in ("target", "as_operator") and isinstance(value, str):
            _check_operator(value)
        elif key == "expr_str":
            _check_shape_text(value)
        elif key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            _check_tree(json.loads(value)[1])
        elif key == "as_custom_obj":
            raise InvalidArchive(f"{where}: a custom object would be unpickled, and is refused")
        else:
            _check(value, where)


def _check_operator(target: str) -> None:
    if found := OPERATOR.fullmatch(target):
        if (
            found[2] not in FILE_OPERATORS
            and "__" not in found[3]
            and not (found[2].endswith("__") and found[2][2:3] == "_")
        ):
            return
    elif CONTROL_FLOW.fullmatch(target) or SCALAR_FUNCTION.fullmatch(target):
        return
    raise InvalidArchive(f"{PROGRAM} calls {target!r}, which is not a numeric operator, and is refused")


def _check_shape_text(text: str) -> None:
    """A symbolic size is evaluated as Python by sympy: only arithmetic over symbols and known functions passes."""
    refused = InvalidArchive(f"{PROGRAM} has the symbolic size {text[:80]!r}, which is not arithmetic, and is refused")
    if len(text) > MAX_SHAPE_TEXT:
        raise refused
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError) as error:
        raise refused from error
    for node in ast.walk(tree):
        if not isinstance(node, SHAPE_NODES):
            raise refused
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in SHAPE_FUNCTIONS):
            raise refused
        if isinstance(node, ast.Name) and node.id not in SHAPE_FUNCTIONS and not SHAPE_NAME.fullmatch(node.id):
            raise refused
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            raise refused


def _check_tree(tree: dict[str, Any]) -> None:
    """How inputs and outputs nest: containers of Python only. Others import modules that the file names."""
    if tree["type"] not in TREE_TYPES or "__enum__" in str(tree["context"]):
        raise InvalidArchive(f"{PROGRAM} nests tensors in {tree['type']!r}: only tuples, lists and dicts are taken")
    for child in tree["children_spec"]:
        _check_tree(child)
