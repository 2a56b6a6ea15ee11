"""A member as PyTorch's users run an exported program: what our workers' execution of it is compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.workloads import Array


class PlainMember:
    """A member as `torch.export.load` gives it, with its softmax."""

    def __init__(self, path: Path) -> None:
        self._module = torch.export.load(path).module()

    def run(self, inputs: list[Array]) -> list[Array]:
        """The probabilities of one batch."""
        # A tensor that shares memory must be writable, and the body of a request is not.
        logits = self._module(*(torch.from_numpy(rows.copy()) for rows in inputs))
        return [torch.softmax(logits, -1).numpy()]
