"""Activations of outputs, against FP64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends.tensors import VECTOR, WORTH_TURNING, exporter

# Rows before and behind the number from which a short last axis is turned.
ROWS = [1, 2, WORTH_TURNING // 3, WORTH_TURNING]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (VECTOR - 1,), (VECTOR,), (1000,), (5, 3)], ids=str)
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16", "BF16"])
def test_softmax_is_over_the_last_axis(rows: int, shape: tuple[int, ...], datatype: str) -> None:
    spec = TensorSpec("y", datatype, shape)
    dtype = {"FP32": torch.float32, "FP64": torch.float64, "FP16": torch.float16, "BF16": torch.bfloat16}[datatype]
    scale = 30 if datatype in ("FP32", "FP64") else 3
    y = (torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows)) * scale).to(dtype)
    given = y.clone()
    wanted = torch.softmax(y.double(), -1).numpy()
    found = exporter(spec, "softmax", owned=True)(y)
    assert found.shape == wanted.shape
    assert found.dtype == (np.float64 if datatype == "FP64" else np.float32)
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(y, given)


@pytest.mark.parametrize("turned", [False, True])
def test_softmax_of_what_is_not_finite_or_large(turned: bool) -> None:
    rows = WORTH_TURNING if turned else 4
    y = torch.tensor([[3e38, -3e38, 0.0], [torch.inf, 0.0, 1.0], [-torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    found = exporter(TensorSpec("y", "FP32", (3,)), "softmax", owned=True)(y.repeat(rows // 4, 1))
    assert found[0].tolist() == [1.0, 0.0, 0.0]
    assert np.isnan(found[1::4]).any(axis=1).all()
    assert found[2].tolist() == [0.0, 0.5, 0.5]
    assert np.isnan(found[3::4]).all()


def test_softmax_of_a_stack_of_members_is_each_members() -> None:
    of_all = torch.randn(WORTH_TURNING, 3, 10).transpose(0, 1)
    export = exporter(TensorSpec("y", "FP32", (10,)), "softmax", owned=True)
    for one, found in zip(of_all, export(of_all), strict=True):
        np.testing.assert_allclose(found, torch.softmax(one, -1).numpy(), rtol=1e-5, atol=1e-7)
