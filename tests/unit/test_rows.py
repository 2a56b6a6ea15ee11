"""Rows in slots: what was put is gathered, in any order, and pages exist only once written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.rows import HostRows

INPUTS = (TensorSpec("x", "FP32", (2,)), TensorSpec("flag", "BOOL", (1,)))


def test_rows_come_back_from_their_slots() -> None:
    rows = HostRows(INPUTS, 8)
    rows.put(np.array([5, 1]), [np.array([[5, 50], [1, 10]], np.float32), np.array([[True], [False]])])
    rows.put(np.array([5]), [np.array([[6, 60]], np.float32), np.array([[False]])])
    x, flag = rows.gather(np.array([1, 5, 1]))
    assert x.tolist() == [[1, 10], [6, 60], [1, 10]]
    assert flag.tolist() == [[False]] * 3
    x[:] = 0
    assert rows.gather(np.array([1]))[0].tolist() == [[1, 10]]


def test_a_slot_that_is_not_there_is_an_error() -> None:
    rows = HostRows(INPUTS, 2)
    with pytest.raises(IndexError):
        rows.gather(np.array([2]))
    with pytest.raises(IndexError):
        rows.put(np.array([2]), [np.zeros((1, 2), np.float32), np.zeros((1, 1), np.bool_)])


def test_a_large_store_takes_no_memory_until_it_is_written() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    rows = HostRows((TensorSpec("x", "FP32", (3, 224, 224)),), 4000)
    rows.put(np.array([3999]), [np.ones((1, 3, 224, 224), np.float32)])
    assert resident_pages() - before < 10_000
