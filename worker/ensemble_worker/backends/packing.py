"""Weights of convolutions laid out as oneDNN's kernels want them, for any number of rows.

Which layout that is can depend on the number of rows (and of threads, of which all that run models here have equally
many). To change it during a call can take many times as long as the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ensemble_worker.backends.loaded import Call

mkldnn = torch.ops.mkldnn

# A layer that wants one layout for all of these is taken to want it for any number of rows.
PROBED_ROWS = (1, 2, 3, *(1 << power for power in range(2, 11)))


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights (outputs, inputs of a group, height, width) of a layer whose input is of `shape` for `sample_rows` rows.

    `padding` is above and below, then left and right. Of each layout that was wanted there is one tensor.
    """

    plain: torch.Tensor
    padding: list[int]
    stride: list[int]
    dilation: list[int]
    groups: int
    shape: torch.Size
    sample_rows: int
    _of_layout: dict[bytes, torch.Tensor] = field(default_factory=dict)
    _of_rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def packed(self, rows: int) -> torch.Tensor:
        """The weights for so many rows: the same tensor where the layout is the same."""
        known = self._of_rows.get(rows)
        if known is None:
            known = self._of_rows[rows] = self._pack(rows)
        return known

    def change(self) -> bool:
        """Whether other numbers of rows want other layouts."""
        return len({id(self.packed(rows)) for rows in PROBED_ROWS}) > 1

    def _pack(self, rows: int) -> torch.Tensor:
        shape = [self.shape[0] * rows // self.sample_rows, *self.shape[1:]]
        packed = mkldnn._reorder_convolution_weight(
            self.plain, self.padding, self.stride, self.dilation, self.groups, shape
        )
        layout = mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        return self._of_layout.setdefault(layout, packed)


class WithWeights:
    """A module that takes, after its inputs, the weights that change with the number of rows.

    For some numbers of rows they are packed before it serves, for any other when it comes up, in some milliseconds.
    """

    def __init__(self, module: Call, weights: Sequence[Weights]) -> None:
        self._module = module
        self._weights = weights

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """What the module gives for these inputs."""
        rows = min(len(inputs[0]), PROBED_ROWS[-1])
        return self._module(*inputs, *[one.packed(rows) for one in self._weights])
