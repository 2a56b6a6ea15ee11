"""What model files say of themselves, and what is matched with what is declared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker import signature
from ensemble_worker.backends.fitting import check_batch, match
from ensemble_worker.errors import InvalidModel
from ensemble_worker.signature import Signature
from tests.support import models

A, B = TensorSpec("a", "FP32", (4,)), TensorSpec("b", "FP32", (1,))


def test_an_export_tells_everything(tmp_path: Path) -> None:
    told = signature.of(models.export_two_by_two(tmp_path / "m.pt2"), "torch-export")
    assert told.inputs == (TensorSpec("image", "FP32", (4,)), TensorSpec("scale", "FP32", (1,)))
    assert told.outputs == (TensorSpec("scaled", "FP32", (4,)), TensorSpec("total", "FP32", (1,)))
    assert (told.dynamic_batch, told.fixed_batch, told.max_batch) == (True, None, models.MAX_BATCH)


def test_an_export_at_a_fixed_batch_says_so(tmp_path: Path) -> None:
    told = signature.of(models.export_mlp(tmp_path / "m.pt2", seed=1, batch=6), "torch-export")
    assert (told.dynamic_batch, told.fixed_batch, told.max_batch) == (False, 6, None)


def test_an_onnx_file_tells_everything(tmp_path: Path) -> None:
    told = signature.of(models.export_mlp(tmp_path / "m.onnx", seed=1), "onnx")
    assert told.inputs == (TensorSpec("input_0", "FP32", (64,)),)
    assert told.outputs == (TensorSpec("output", "FP32", (10,)),)
    assert (told.dynamic_batch, told.fixed_batch) == (True, None)


def test_torchscript_tells_nothing(tmp_path: Path) -> None:
    assert signature.of(models.export_mlp(tmp_path / "m.pt", seed=1), "torchscript") == Signature()


class Scalar(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_an_input_without_a_batch_is_refused(tmp_path: Path) -> None:
    path = models.export_module(tmp_path / "m.pt2", Scalar(), [torch.tensor(1.0)], batch=1)
    with pytest.raises(InvalidModel, match="no batch dimension"):
        signature.of(path, "torch-export")


@pytest.mark.parametrize(
    ("kind", "declared", "told", "order"),
    [
        ("input", (A, B), None, (0, 1)),
        ("input", (B, A), (A, B), (1, 0)),
        ("output", (B, A), (A, B), (1, 0)),
        ("output", (TensorSpec("x", "FP32", (4,)), B), (A, B), (0, 1)),
    ],
)
def test_tensors_are_matched_by_name_else_by_position(
    kind: str, declared: tuple[TensorSpec, ...], told: tuple[TensorSpec, ...] | None, order: tuple[int, ...]
) -> None:
    assert match(kind, declared, told) == order


def test_three_inputs_in_another_order_are_inverted() -> None:
    a, b, c = (TensorSpec(n, "FP32", (1,)) for n in "abc")
    assert match("input", (b, c, a), (a, b, c)) == (2, 0, 1)
    assert match("output", (b, c, a), (a, b, c)) == (1, 2, 0)


@pytest.mark.parametrize(
    ("declared", "cause"),
    [
        ((A,), r"has 2 inputs \(a, b\), declared are 1 \(a\)"),
        ((A, TensorSpec("b", "FP16", (1,))), r"input 'b': declared FP16 \[1\], the model has FP32 \[1\]"),
        ((A, TensorSpec("b", "FP32", (2,))), r"input 'b': declared FP32 \[2\], the model has FP32 \[1\]"),
    ],
)
def test_what_differs_is_named(declared: tuple[TensorSpec, ...], cause: str) -> None:
    with pytest.raises(InvalidModel, match=cause):
        match("input", declared, (A, B))


def test_batches_beyond_the_export_are_refused() -> None:
    check_batch(8, None, 8)
    check_batch(None, 8, 8)
    with pytest.raises(InvalidModel, match="batches of 8 rows: 9"):
        check_batch(8, None, 9)
    with pytest.raises(InvalidModel, match="up to 8 rows: 9"):
        check_batch(None, 8, 9)
