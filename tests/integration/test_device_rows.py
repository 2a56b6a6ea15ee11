"""Rows on a GPU, where there is one: uploaded into slots, gathered from ranges, run as they lie."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_contract.wire import RowRanges
from ensemble_worker import devices, predictor

INPUTS = (TensorSpec("x", "FP32", (2,)), TensorSpec("half", "BF16", (1,)))


def _ranges(*pairs: tuple[int, int]) -> RowRanges:
    starts, counts = zip(*pairs, strict=True)
    return RowRanges(array("I", starts), array("I", counts), sum(counts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_come_back_from_their_slots() -> None:
    device = next(one for one in devices.discover() if one.kind == "cuda")
    rows = predictor.device_rows(device, INPUTS, 8)
    assert rows.slots == 8
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    half = np.array([[1], [2], [3]], np.uint16)
    rows.put(_ranges((5, 2), (1, 1)), [x, half])
    x[:] = 0
    got = rows.gather(_ranges((1, 1), (5, 1), (6, 1)))
    assert got[0].cpu().tolist() == [[4, 5], [0, 1], [2, 3]]
    assert got[1].view(torch.int16).cpu().tolist() == [[3], [1], [2]]
