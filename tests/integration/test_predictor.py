"""Predictors on the CPU: every format and datatype gives what eager torch gives, and what differs is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker import devices, predictor
from ensemble_worker.backends.tensors import host_array
from ensemble_worker.errors import ModelError
from tests.support import models

Specs = tuple[TensorSpec, ...]
X64, Y10 = (TensorSpec("x", "FP32", (64,)),), (TensorSpec("y", "FP32", (10,)),)
IMAGE = (TensorSpec("x", "FP32", (3, 32, 32)),)
FORMATS = {".pt2": "torch-export", ".pt": "torchscript", ".onnx": "onnx"}
DEVICE = devices.cpu_device(0, (0,), 1 << 30)


def _load(
    path: Path, inputs: Specs, outputs: Specs, batch_size: int = 8, activation: str = "none"
) -> predictor.Predictor:
    source = ModelSource("cat", "d", path.as_uri(), FORMATS[path.suffix], activation)
    return predictor.load(path, source, inputs, outputs, DEVICE, batch_size)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As a worker with one core has it; more threads than free cores make small models erratic."""
    torch.set_num_threads(1)


def _close(got: np.ndarray[Any, Any], wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.from_numpy(got), wanted.detach(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_an_mlp_answers_as_eager(tmp_path: Path, suffix: str, rows: int) -> None:
    loaded = _load(models.export_mlp(tmp_path / f"m{suffix}", seed=3), X64, Y10)
    x = torch.randn(rows, 64)
    _close(loaded.run([x.numpy()])[0], models.make_mlp(seed=3)(x))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cnn_answers_as_eager_for_every_number_of_rows(tmp_path: Path, suffix: str) -> None:
    loaded = _load(models.export_cnn(tmp_path / f"m{suffix}", seed=3), IMAGE, Y10)
    eager = models.make_cnn(seed=3)
    for rows in (8, 1, 3, 8, 7):
        x = torch.randn(rows, 3, 32, 32)
        got = loaded.run([x.numpy()])[0]
        assert got.flags.c_contiguous
        _close(got, eager(x))


def test_a_dynamic_export_is_compiled(tmp_path: Path) -> None:
    """A graph that flattens with the batch's size must not fall back to eager."""
    assert _load(models.export_cnn(tmp_path / "m.pt2", seed=3), IMAGE, Y10).form != "eager"


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_fixed_batch_is_padded_and_rows_do_not_leak(tmp_path: Path, suffix: str) -> None:
    loaded = _load(models.export_mlp(tmp_path / f"m{suffix}", seed=3, batch=8), X64, Y10, batch_size=4)
    assert loaded.fixed_batch == 8
    eager = models.make_mlp(seed=3)
    first, second = torch.randn(8, 64), torch.randn(3, 64)
    kept = loaded.run([first.numpy()])[0]
    _close(loaded.run([second.numpy()])[0], eager(second))
    _close(kept, eager(first))


def test_a_batch_beyond_the_fixed_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="batches of 8 rows: 9 are too many"):
        _load(models.export_mlp(tmp_path / "m.pt2", seed=3, batch=8), X64, Y10, batch_size=9)


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
@pytest.mark.parametrize(("datatype", "dtype"), [("BF16", torch.bfloat16), ("FP16", torch.float16)])
def test_half_precision_travels_as_fp32(tmp_path: Path, suffix: str, datatype: str, dtype: torch.dtype) -> None:
    path = models.export_mlp(tmp_path / f"m{suffix}", seed=3, dtype=dtype)
    loaded = _load(path, (TensorSpec("x", datatype, (64,)),), (TensorSpec("y", datatype, (10,)),))
    x = torch.randn(4, 64).to(dtype)
    got = loaded.run([host_array(x)])[0]
    assert got.dtype == np.float32
    _close(got, models.make_mlp(seed=3).to(dtype)(x).float(), tolerance=2e-2)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "softmax": lambda y: torch.softmax(y, -1),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_activations(tmp_path: Path, suffix: str, activation: str) -> None:
    loaded = _load(models.export_mlp(tmp_path / f"m{suffix}", seed=3), X64, Y10, activation=activation)
    x = torch.randn(4, 64)
    _close(loaded.run([x.numpy()])[0], ACTIVATIONS[activation](models.make_mlp(seed=3)(x)))


def test_several_inputs_and_outputs_are_matched_by_name(tmp_path: Path) -> None:
    inputs = (TensorSpec("scale", "FP32", (1,)), TensorSpec("image", "FP32", (4,)))
    outputs = (TensorSpec("total", "FP32", (1,)), TensorSpec("scaled", "FP32", (4,)))
    loaded = _load(models.export_two_by_two(tmp_path / "m.pt2"), inputs, outputs)
    scale, image = torch.randn(3, 1), torch.randn(3, 4)
    total, scaled = loaded.run([scale.numpy(), image.numpy()])
    _close(total, image.sum(-1, keepdim=True) + scale)
    _close(scaled, image * scale)


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_integers_and_flags(tmp_path: Path, suffix: str) -> None:
    inputs = (TensorSpec("ids", "INT64", (3,)), TensorSpec("keep", "BOOL", (3,)))
    outputs = (TensorSpec("kept", "INT64", (3,)), TensorSpec("any", "BOOL", (1,)))
    loaded = _load(models.export_integers_and_flags(tmp_path / f"m{suffix}"), inputs, outputs)
    ids, keep = np.array([[1, -2, 3], [4, 5, 6]]), np.array([[True, True, False], [False] * 3])
    kept, some = loaded.run([ids, keep])
    assert kept.tolist() == [[2, -4, 0], [0, 0, 0]]
    assert some.tolist() == [[True], [False]]
    assert (kept.dtype.name, some.dtype.name) == ("int64", "bool")


class Doubled(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.int64) * 2).to(self.dtype)


@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32"])
def test_every_integer(tmp_path: Path, datatype: str) -> None:
    spec = TensorSpec("x", datatype, (2,))
    dtype = getattr(torch, datatype.lower())
    path = models.export_module(tmp_path / "m.pt2", Doubled(dtype), [torch.zeros(2, 2, dtype=dtype)])
    loaded = _load(path, (spec,), (TensorSpec("y", datatype, (2,)),))
    rows = np.array([[1, 2], [50, 60]], spec.dtype)
    assert loaded.run([rows])[0].tolist() == [[2, 4], [100, 120]]


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu_() + 1


class Passed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :10]


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_a_model_that_writes_into_its_input_leaves_the_rows_alone(tmp_path: Path, suffix: str) -> None:
    path = models.export_module(tmp_path / f"m{suffix}", InPlace(), [torch.zeros(2, 10)])
    loaded = _load(path, (TensorSpec("x", "FP32", (10,)),), Y10)
    rows = np.full((2, 10), -1.0, np.float32)
    assert loaded.run([rows])[0].tolist() == [[1.0] * 10] * 2
    assert rows.tolist() == [[-1.0] * 10] * 2


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_an_output_that_is_an_input_is_a_copy(tmp_path: Path, suffix: str) -> None:
    loaded = _load(models.export_module(tmp_path / f"m{suffix}", Passed(), [torch.zeros(2, 64)]), X64, Y10)
    rows = np.ones((2, 64), np.float32)
    answer = loaded.run([rows])[0]
    rows[:] = 7
    assert answer.tolist() == [[1.0] * 10] * 2


def test_read_only_rows_are_taken(tmp_path: Path) -> None:
    loaded = _load(models.export_mlp(tmp_path / "m.pt2", seed=3), X64, Y10)
    rows = np.frombuffer(bytes(64 * 4), np.float32).reshape(1, 64)
    assert loaded.run([rows])[0].shape == (1, 10)


@pytest.mark.parametrize(
    ("inputs", "outputs", "cause"),
    [
        ((TensorSpec("x", "FP32", (65,)),), Y10, r"input 'x': declared FP32 \[65\], the model has FP32 \[64\]"),
        ((TensorSpec("x", "INT8", (64,)),), Y10, r"input 'x': declared INT8 \[64\]"),
        (X64, (TensorSpec("y", "FP32", (11,)),), r"output 'y': declared FP32 \[11\], the model has FP32 \[10\]"),
        (X64, (*Y10, TensorSpec("z", "FP32", (1,))), r"has 1 outputs"),
    ],
)
def test_what_differs_from_the_declaration_is_named(tmp_path: Path, inputs: Specs, outputs: Specs, cause: str) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=3)
    with pytest.raises(ModelError, match=cause) as caught:
        _load(path, inputs, outputs)
    assert f"member 'cat' ({path.as_uri()})" in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "cause"),
    [
        (
            (TensorSpec("y", "FP32", (11,)),),
            r"output 'y': declared FP32 \[8, 11\] for 8 rows, the model gives FP32 \[8, 10\]",
        ),
        ((TensorSpec("y", "FP64", (10,)),), r"declared FP64 \[8, 10\]"),
    ],
)
def test_torchscript_is_compared_by_running_it(tmp_path: Path, outputs: Specs, cause: str) -> None:
    with pytest.raises(ModelError, match=cause):
        _load(models.export_mlp(tmp_path / "m.pt", seed=3), X64, outputs)


def test_softmax_of_integers_is_refused(tmp_path: Path) -> None:
    path = models.export_module(tmp_path / "m.pt2", Doubled(torch.int32), [torch.zeros(2, 2, dtype=torch.int32)])
    spec = (TensorSpec("x", "INT32", (2,)),)
    with pytest.raises(ModelError, match="needs floating outputs"):
        _load(path, spec, spec, activation="softmax")


def _broken(path: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def _flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 0xFF


def _cut(content: bytearray) -> None:
    del content[len(content) * 2 // 3 :]


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
@pytest.mark.parametrize("change", [_flip, _cut])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, change: Callable[[bytearray], object]) -> None:
    path = _broken(models.export_mlp(tmp_path / f"m{suffix}", seed=3), change)
    with pytest.raises(ModelError, match=r"damaged|truncated"):
        _load(path, X64, Y10)


@pytest.mark.parametrize("suffix", FORMATS)
def test_missing_and_wrong_files_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelError, match="member 'cat'"):
        _load(tmp_path / f"none{suffix}", X64, Y10)
    text = tmp_path / f"text{suffix}"
    text.write_text("<html>not found</html>")
    with pytest.raises(ModelError, match="member 'cat'"):
        _load(text, X64, Y10)


def _fastest_s(*acts: Callable[[], object], runs: int = 3000) -> list[float]:
    """The shortest time of each; in turns, so that a busy moment is one for all of them."""
    best = [float("inf")] * len(acts)
    for _ in range(runs):
        for index, act in enumerate(acts):
            started = time.perf_counter()
            act()
            best[index] = min(best[index], time.perf_counter() - started)
    return best


def test_little_is_done_around_the_model(tmp_path: Path) -> None:
    """One row of a tiny model: all but the model and its softmax take a few microseconds."""
    loaded = _load(models.export_mlp(tmp_path / "m.pt2", seed=3), X64, Y10, activation="softmax")
    rows: Sequence[Any] = [np.zeros((1, 64), np.float32)]
    frozen = torch.jit.freeze(torch.jit.script(models.make_mlp(seed=3)))
    tensor = torch.zeros(1, 64)
    with torch.inference_mode():
        model_s, all_s = _fastest_s(lambda: torch.softmax(frozen(tensor), -1), lambda: loaded.run(rows))
    assert all_s - model_s < 30e-6


def test_the_thread_that_loads_and_runs_a_model_computes_as_before(tmp_path: Path) -> None:
    """Denormals and threads are set for a worker's own threads, never for whoever reads a model."""
    loaded = _load(models.export_mlp(tmp_path / "m.pt2", seed=3), X64, Y10)
    loaded.run([np.zeros((8, 64), np.float32)])
    assert np.float32(1e-45) * np.float32(1) > 0
