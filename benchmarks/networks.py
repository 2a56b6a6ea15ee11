"""The networks of the benchmarks: small, with seeded random weights, and answers that still differ from row to row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 10
LOGIT_SPREAD = 2.0


def mlp(hidden: int = 256) -> nn.Module:
    """64 → 256 → 256 → 10: so small that a server's own cost is what a measurement shows."""
    return nn.Sequential(
        nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )


def plain_cnn() -> nn.Module:
    """Stacked 3x3 convolutions, as in VGG."""
    return nn.Sequential(
        _conv(3, 48), _conv(48, 48), nn.MaxPool2d(2),
        _conv(48, 96), _conv(96, 96), nn.MaxPool2d(2),
        _conv(96, 192), _conv(192, 192), *_head(192),
    )  # fmt: skip


def residual_cnn() -> nn.Module:
    """Residual blocks of two 3x3 convolutions, as in ResNet."""
    return nn.Sequential(
        _conv(3, 32), _Residual(32), _Residual(32), _conv(32, 64, stride=2), _Residual(64), _Residual(64),
        _conv(64, 128, stride=2), _Residual(128), _Residual(128), *_head(128),
    )  # fmt: skip


def separable_cnn() -> nn.Module:
    """Depthwise separable convolutions, as in MobileNet."""
    return nn.Sequential(
        _conv(3, 64), _separable(64, 128), _separable(128, 128, stride=2), _separable(128, 256), _separable(256, 256),
        _separable(256, 384, stride=2), _separable(384, 384), *_head(384),
    )  # fmt: skip


def wide_cnn() -> nn.Module:
    """Few, wide layers with 5x5 kernels."""
    return nn.Sequential(
        _conv(3, 64, kernel=5), nn.MaxPool2d(2), _conv(64, 128, kernel=5), nn.MaxPool2d(2), _conv(128, 256), *_head(256)
    )


MLPS: tuple[Callable[[], nn.Module], ...] = (mlp, mlp, mlp, mlp)
CNNS: tuple[Callable[[], nn.Module], ...] = (plain_cnn, residual_cnn, separable_cnn, wide_cnn)


def build(make: Callable[[], nn.Module], seed: int, rows: torch.Tensor) -> nn.Module:
    """A network in evaluation mode whose batch statistics and logits fit `rows`.

    Its last layer is scaled so that the logits spread over classes and differ between rows: an answer for the wrong row
    would be noticed.
    """
    torch.manual_seed(seed)
    network = make().train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        # An average over all passes, here one, instead of a moving one.
        norm.momentum = None
    with torch.no_grad():
        network(rows)
        network.eval()
        logits = network(rows)
        last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        spread = (logits - logits.mean(0)).std() / LOGIT_SPREAD
        last.weight /= spread
        last.bias.copy_(-(logits - last.bias).mean(0) / spread)
    return network


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Add the block's output to its input."""
        return torch.relu(images + self.body(images))


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _separable(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, inputs, stride=stride, groups=inputs), _conv(inputs, outputs, kernel=1))


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
