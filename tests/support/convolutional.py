"""Small networks of convolutions, each with something around them that can or cannot be part of their operator."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# Height and width of the images.
PIXELS = 12


class Through(nn.Module):
    """What a function makes of a convolution of the images, from 3 to 8 channels."""

    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor], **options: object) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, **{"kernel_size": 3, "padding": 1, **options})  # type: ignore[arg-type]
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.convolution(x))


class Block(nn.Module):
    """A residual block that writes into its tensors, as torchvision's do."""

    def __init__(self, channels: int, *, norm_first: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Conv2d(channels, channels, 1)
        self.one_norm, self.two_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, affine=False)
        self.act = nn.ReLU(inplace=True)
        self.norm_first = norm_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(self.act(self.one_norm(self.one(x))))
        if self.norm_first:
            return x + y
        y = self.two_norm(y)
        y += x
        return torch.relu_(y)


class Padded(nn.Module):
    """Padding as TensorFlow's SAME has it: more zeros at the end than at the beginning."""

    def __init__(self, around: tuple[int, int, int, int], **options: int) -> None:
        super().__init__()
        self.around = around
        self.convolution = nn.Conv2d(3, 8, **{"kernel_size": 3, "stride": 2, **options})  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.hardtanh(self.convolution(functional.pad(x, self.around)), 0.0, 6.0)


class Positions(nn.Module):
    """Adds what is the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(1, 8, PIXELS, PIXELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(x) + self.positions)


class Two(nn.Module):
    """The sum of two convolutions; each could be the other's addend."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.one(x) + self.two(x))


class TwoInputs(nn.Module):
    """Images and what is added to their features, through a layer whose weights change with the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 192, 1), nn.Conv2d(192, 1152, 1)
        self.third = nn.Conv2d(1152, 192, 1)

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.third(torch.relu(self.second(self.first(x) + features)))
        return y


class GroupedSum(nn.Module):
    """A sum after a convolution of several groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolution(x) + x)


class Shuffled(nn.Module):
    """Channels in another order, by views that channels-last images do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        y = y.view(y.size(0), 2, 4, PIXELS, PIXELS).transpose(1, 2).contiguous().view(y.size(0), 8, PIXELS, PIXELS)
        made: torch.Tensor = self.two(y).view(y.size(0), -1)
        return made


class ComputedWeights(nn.Module):
    """Weights that are computed at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, torch.tanh(self.weight))


def late_layers() -> nn.Module:
    """Wide layers of small images, whose kernels want other layouts for other numbers of rows."""
    return nn.Sequential(
        nn.Conv2d(3, 192, 1), nn.ReLU6(), nn.Conv2d(192, 1152, 1), nn.ReLU6(),
        nn.Conv2d(1152, 1152, 5, padding=2, groups=1152), nn.ReLU6(), nn.Conv2d(1152, 192, 1),
        nn.Conv2d(192, 384, 1), nn.ReLU(), nn.Conv2d(384, 384, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip


def decoder() -> nn.Module:
    """A transposed convolution among others."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 2, stride=2), nn.Sigmoid()
    )


def random_layer(chance: random.Random) -> nn.Module:
    """A layer that takes and gives 8 channels."""
    match chance.randrange(8):
        case 0:
            return nn.Conv2d(8, 8, 3, 1, 1, groups=chance.choice((1, 8)), bias=chance.random() < 0.5)
        case 1:
            return nn.ZeroPad2d((chance.randrange(3), chance.randrange(3), 1, chance.randrange(3)))
        case 2 | 3:
            return Block(8, norm_first=chance.random() < 0.5)
        case 4:
            return nn.BatchNorm2d(8)
        case other:
            return (nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish())[other - 5]


def with_statistics(network: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms that have seen something."""
    torch.manual_seed(3)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        if norm.running_mean is not None and norm.running_var is not None:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias)
    return network.eval()
