"""The members that tests of the data plane serve: each takes `x` (8 FP32) and gives `y` (8 FP32)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from tests.support.http_client import WIDTH, Array
from tests.support.models import export_mlp, export_module, make_mlp

X = (TensorSpec("x", "FP32", (WIDTH,)),)
Y = (TensorSpec("y", "FP32", (WIDTH,)),)
UNLUCKY, POISON = 1313.0, 6666.0
MLPS = ("mlp1", "mlp2", "mlp3")
TIMES = ("times1", "times2", "times3")


class Times(nn.Module):
    """`x` times a number: rows can be recognised in the answer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Touchy(nn.Module):
    """`x`, but fails on a batch with a row that begins with UNLUCKY."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unlucky = (x[:, 0] == UNLUCKY).long()
        return x + torch.index_select(torch.zeros(4), 0, unlucky * 9)[:, None]


class Poisonable(nn.Module):
    """`x`, but the process dies of SIGFPE on a batch with a row that begins with POISON (the least INT64 by -1)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        poisoned = (x[:, 0] == POISON).long()
        dividend = torch.where(poisoned.bool(), torch.full_like(poisoned, -(2**63)), torch.ones_like(poisoned))
        quotient = torch.div(dividend, torch.full_like(dividend, -1), rounding_mode="trunc")
        return x + 0 * quotient.float()[:, None]


class Tired(nn.Module):
    """`x`, after a few milliseconds of work whatever the number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        work = torch.eye(256) + 0 * x[0, 0]
        for _ in range(12):
            work = work @ work
        return x * work[0, 0]


def write_models(folder: Path) -> dict[str, ModelSource]:
    """Every member as a TorchScript file in `folder`, by name."""
    example = (torch.zeros(2, WIDTH),)
    modules: dict[str, nn.Module] = {name: Times(float(name[-1])) for name in TIMES}
    modules |= {"touchy": Touchy(), "poisonable": Poisonable(), "tired": Tired()}
    for name, module in modules.items():
        export_module(folder / f"{name}.pt", module.eval(), example)
    for name in MLPS:
        export_mlp(folder / f"{name}.pt", seed=int(name[-1]), inputs=WIDTH, hidden=32, classes=WIDTH)
    return {
        name: ModelSource(
            name,
            f"digest-{name}",
            f"file:{folder / name}.pt",
            "torchscript",
            activation="softmax" if name in MLPS else "none",
        )
        for name in (*modules, *MLPS)
    }


def mlp_outputs(x: Array) -> Array:
    """What the MLP members answer, computed in this process: of shape (members, rows, classes)."""
    with torch.inference_mode():
        outputs = [
            torch.softmax(make_mlp(seed=int(name[-1]), inputs=WIDTH, hidden=32, classes=WIDTH)(torch.from_numpy(x)), -1)
            for name in MLPS
        ]
    return torch.stack(outputs).numpy()
