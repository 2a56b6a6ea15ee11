"""What the workers of the link tests compute: 64 instances, with several inputs and outputs of different datatypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

INSTANCES = range(1, 65)

INPUTS = (TensorSpec("x", "FP32", (8,)), TensorSpec("tag", "INT64", (1,)))
BIG_INPUTS = (TensorSpec("x", "FP32", (3, 224, 224)), TensorSpec("tag", "INT64", (1,)))
# Every member of a worker gives several, of different sizes: places of outputs are padded, frames are not.
OUTPUTS = (TensorSpec("y", "FP32", (4,)), TensorSpec("mark", "UINT8", (3,)), TensorSpec("tag", "INT64", (1,)))


def model(inputs: Sequence[Array], instance: int) -> list[Array]:
    """What every worker here computes: each row's answer tells which row it was, and which instance answered."""
    x, tag = inputs
    flat = x.reshape(len(x), -1)
    mark = (tag + np.array([instance, 100, 200])) % 251
    return [(flat[:, [0, 1, -2, -1]] * 2 + instance * tag).astype(np.float32), mark.astype(np.uint8), tag * instance]


def stacked(inputs: Sequence[Array], instances: Sequence[int]) -> list[Array]:
    """What these instances answer together: one array an output, of shape (instances, rows, *shape)."""
    return [np.stack(parts) for parts in zip(*(model(inputs, one) for one in instances), strict=True)]
