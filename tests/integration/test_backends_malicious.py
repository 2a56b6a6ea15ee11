"""Model files that would run code when torch loads them: each is refused, or loaded without the part, and nothing runs.

Where torch itself is caught by a file, the test shows that first: otherwise a file that does no harm would pass for
safe.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker import devices, predictor
from ensemble_worker.errors import ModelError
from tests.support import models

Files = dict[str, bytes]
INPUTS = (TensorSpec("x", "FP32", (64,)),)
OUTPUTS = (TensorSpec("y", "FP32", (10,)),)
PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def _pickled(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker), protocol=2)


def _torch_pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Bomb(marker),), buffer)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As a worker with one core has it; more threads than free cores make small models erratic."""
    torch.set_num_threads(1)


def _rewrite(path: Path, change: Callable[[Files], None]) -> Path:
    """Change the records of an archive; `change` sees names without their top folder."""
    with zipfile.ZipFile(path) as zipped:
        root = zipped.namelist()[0].split("/")[0]
        files = {name.removeprefix(f"{root}/"): zipped.read(name) for name in zipped.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(f"{root}/{name}", content)
    return path


def _edit(files: Files, name: str, change: Callable[[Any], None]) -> None:
    parsed = json.loads(files[name])
    change(parsed)
    files[name] = json.dumps(parsed).encode()


def _load(path: Path, model_format: str = "torch-export") -> predictor.Predictor:
    source = ModelSource(name="cat", digest="d", uri=path.as_uri(), format=model_format)
    return predictor.load(path, source, INPUTS, OUTPUTS, devices.cpu_device(0, (0,), 1 << 30), 2)


def _expression(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch() or 1"


def _pickled_weight(files: Files, marker: Path) -> None:
    files["data/weights/weight_0"] = _torch_pickled(marker)
    _edit(files, WEIGHTS, lambda c: c["config"]["0.weight"].update(use_pickle=True))


def _opaque_constant(files: Files, marker: Path) -> None:
    files["data/constants/opaque_obj_0"] = _pickled(marker)
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    _edit(files, CONSTANTS, lambda c: c["config"].update(thing=meta))


def _legacy_weights(files: Files, marker: Path) -> None:
    files["data/weights/model.pt"] = _torch_pickled(marker)


def _legacy_constants(files: Files, marker: Path) -> None:
    files["data/constants/model.pt"] = _torch_pickled(marker)


def _size_expression(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = _expression(marker)

    _edit(files, PROGRAM, change)


def _attribute_expression(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        sizes = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        text = f"Symbol('s0').__class__.__init__.__globals__['os'].system('touch {marker}')"
        sizes[0]["as_expr"]["expr_str"] = text

    _edit(files, PROGRAM, change)


def _python_target(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.mknod"
        node["inputs"] = [{"name": "path", "arg": {"as_string": str(marker)}, "kind": 1}]

    _edit(files, PROGRAM, change)


def _file_operator(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    _edit(files, PROGRAM, change)


def _imported_container(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        call = program["graph_module"]["module_call_graph"][0]["signature"]
        factory = {"default_factory_module": "antigravity", "default_factory_name": "fly"}
        context = json.dumps({**factory, "dict_context": []})
        call["out_spec"] = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])

    _edit(files, PROGRAM, change)


def _shared_library(files: Files, marker: Path) -> None:
    files["data/aotinductor/model/evil.so"] = b"\x7fELF"


def _custom_object(files: Files, marker: Path) -> None:
    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {
            "as_custom_obj": {"name": "o", "class_fqn": "x"}
        }

    _edit(files, PROGRAM, change)


def _second_model(files: Files, marker: Path) -> None:
    files["models/other.json"] = files[PROGRAM]


REFUSED = {
    "pickled weight": (_pickled_weight, "would be unpickled"),
    "opaque constant": (_opaque_constant, "would be unpickled"),
    "legacy weights": (_legacy_weights, "would be unpickled"),
    "legacy constants": (_legacy_constants, "would be unpickled"),
    "size expression": (_size_expression, "not arithmetic"),
    "attribute expression": (_attribute_expression, "not arithmetic"),
    "python target": (_python_target, "'torch.os.mknod', which is not a numeric operator"),
    "file operator": (_file_operator, "not a numeric operator"),
    "imported container": (_imported_container, "only tuples, lists and dicts"),
    "shared library": (_shared_library, "compiled code"),
    "custom object": (_custom_object, "custom object"),
    "second model": (_second_model, "one model"),
}
TORCH_IS_CAUGHT = ("pickled weight", "opaque constant", "legacy weights", "legacy constants", "size expression")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_malicious_export_is_refused(tmp_path: Path, kind: str) -> None:
    change, cause = REFUSED[kind]
    marker = tmp_path / "ran"
    path = _rewrite(models.export_mlp(tmp_path / "m.pt2", seed=1), lambda files: change(files, marker))
    with pytest.raises(ModelError, match=cause) as caught:
        _load(path)
    assert "'cat'" in str(caught.value)
    assert path.as_uri() in str(caught.value)
    assert not marker.exists()
    if kind in TORCH_IS_CAUGHT:
        _let_torch_run_it(path)
        assert marker.exists()


def _sample_inputs(files: Files, marker: Path) -> None:
    files["data/sample_inputs/model.pt"] = _torch_pickled(marker)


def _guard(files: Files, marker: Path) -> None:
    guard = f"[{_expression(marker)} for L in [0]] or L['input'].size()[0] > 0"
    _edit(files, PROGRAM, lambda program: program.update(guards_code=[guard]))


@pytest.mark.parametrize("change", [_sample_inputs, _guard])
def test_what_is_not_needed_is_left_out(tmp_path: Path, change: Callable[[Files, Path], None]) -> None:
    marker = tmp_path / "ran"
    path = _rewrite(models.export_mlp(tmp_path / "m.pt2", seed=1), lambda files: change(files, marker))
    rows = torch.rand(2, 64)
    answers = _load(path).run([rows.numpy()])
    torch.testing.assert_close(torch.from_numpy(answers[0]), models.make_mlp(seed=1)(rows).detach())
    assert not marker.exists()
    _let_torch_run_it(path)
    assert marker.exists()


def _let_torch_run_it(path: Path) -> None:
    """What would have happened; that torch may fail afterwards does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.export.load(path).module()(torch.zeros(2, 64))
        except Exception as error:
            print(f"torch: {error!r}")


def test_an_archive_of_torch_2_7_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "old.pt2", tmp_path / "ran"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("version", "8.8")
        for name in ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"):
            zipped.writestr(name, _torch_pickled(marker))
        zipped.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(ModelError, match=r"top folder"):
        _load(path)
    assert not marker.exists()


@pytest.mark.parametrize("model_format", ["torch-export", "torchscript", "onnx"])
def test_a_plain_pickle_is_refused(tmp_path: Path, model_format: str) -> None:
    path, marker = tmp_path / "m.pt2", tmp_path / "ran"
    path.write_bytes(_pickled(marker))
    with pytest.raises(ModelError):
        _load(path, model_format)
    path.write_bytes(_torch_pickled(marker))
    with pytest.raises(ModelError):
        _load(path, model_format)
    assert not marker.exists()


def test_a_pickle_in_torchscript_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = models.export_mlp(tmp_path / "m.pt", seed=1)
    _rewrite(path, lambda files: files.update({"data.pkl": _pickled(marker)}))
    with pytest.raises(ModelError, match=r"data\.pkl would import"):
        _load(path, "torchscript")
    assert not marker.exists()


def test_an_unknown_part_of_torchscript_is_refused(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt", seed=1)
    _rewrite(path, lambda files: files.update({"hidden.pkl": _pickled(tmp_path / "ran")}))
    with pytest.raises(ModelError, match=r"hidden\.pkl"):
        _load(path, "torchscript")


class SavesAtLoad(torch.nn.Module):
    """Writes a file when it is loaded: TorchScript runs `__setstate__`, and has an operator that saves."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :10]

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.marker

    @torch.jit.export
    def __setstate__(self, state: str) -> None:
        self.marker = state
        self.training = False
        torch.save(torch.zeros(1), state)


def test_torchscript_that_writes_files_is_refused(tmp_path: Path) -> None:
    path, marker = tmp_path / "m.pt", tmp_path / "ran"
    torch.jit.save(torch.jit.script(SavesAtLoad(str(marker))), path)
    with pytest.raises(ModelError, match="'save', which opens files"):
        _load(path, "torchscript")
    assert not marker.exists()
    torch.jit.load(path)  # type: ignore[no-untyped-call]
    assert marker.exists()


def test_the_attacks_know_torch_as_it_is() -> None:
    """If torch moves what these files attack, they must be looked at again."""
    package = importlib.import_module("torch.export.pt2_archive.constants")
    assert (package.MODELS_DIR, package.WEIGHTS_DIR, package.CONSTANTS_DIR) == (
        "models/",
        "data/weights/",
        "data/constants/",
    )
