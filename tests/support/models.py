"""Small real models, and the files that users would bring: `.pt2`, `.pt` (TorchScript) and `.onnx`.

Every `export_*` writes one file and returns its path; the same arguments give the same weights. Exports are made once
in a process and kept as bytes, because the first torch.export of a process takes seconds. Batches are dynamic unless
`batch` says otherwise. The suffix of the path chooses the format.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

MAX_BATCH = 4096


class TwoByTwo(nn.Module):
    """Two inputs, `image` (4) and `scale` (1), and two outputs in a dict, `scaled` (4) and `total` (1)."""

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": image * scale, "total": image.sum(-1, keepdim=True) + scale}


class IntegersAndFlags(nn.Module):
    """Inputs `ids` (INT64, 3) and `keep` (BOOL, 3); outputs twice the kept ids (3), and whether any was kept (1)."""

    def forward(self, ids: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.where(keep, ids * 2, torch.zeros_like(ids)), keep.any(-1, keepdim=True)


class Residual(nn.Module):
    """Two convolutions with batch norms, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class Cnn(nn.Module):
    """A small residual network for 3x32x32 images. It flattens with the batch's size, as older networks do."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(Residual(3, width, 1), Residual(width, 2 * width, 2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.features(x)
        logits: torch.Tensor = self.head(y.view(y.size(0), -1))
        return logits


def make_mlp(*, seed: int, inputs: int = 64, hidden: int = 256, classes: int = 10) -> nn.Module:
    """inputs -> hidden -> hidden -> classes with ReLUs, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        return nn.Sequential(*layers).eval()


def make_cnn(*, seed: int, width: int = 16, classes: int = 10) -> nn.Module:
    """A `Cnn` with batch norms that have statistics, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Cnn(width, classes)
        with torch.no_grad():
            module(torch.randn(16, 3, 32, 32))
        return module.eval()


def export_mlp(
    path: Path,
    *,
    seed: int,
    inputs: int = 64,
    hidden: int = 256,
    classes: int = 10,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
) -> Path:
    """An MLP with input `input` (inputs) and one output (classes), both of `dtype`."""
    key = f"mlp {seed} {inputs} {hidden} {classes} {dtype} {batch}"
    return _write(
        path,
        key,
        lambda: make_mlp(seed=seed, inputs=inputs, hidden=hidden, classes=classes).to(dtype),
        (torch.zeros(batch or 2, inputs, dtype=dtype),),
        batch,
    )


def export_cnn(path: Path, *, seed: int, width: int = 16, classes: int = 10, batch: int | None = None) -> Path:
    """A CNN with input `x` (3, 32, 32) and one output (classes), FP32."""
    make = functools.partial(make_cnn, seed=seed, width=width, classes=classes)
    return _write(path, f"cnn {seed} {width} {classes} {batch}", make, (torch.zeros(batch or 2, 3, 32, 32),), batch)


def export_two_by_two(path: Path) -> Path:
    """`TwoByTwo`: FP32 inputs `image` (4) and `scale` (1), outputs `scaled` (4) and `total` (1)."""
    return _write(path, "two by two", lambda: TwoByTwo().eval(), (torch.zeros(2, 4), torch.zeros(2, 1)), None)


def export_integers_and_flags(path: Path) -> Path:
    """`IntegersAndFlags`: INT64 `ids` (3) and BOOL `keep` (3); outputs INT64 (3) and BOOL (1)."""
    example = (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))
    return _write(path, "integers and flags", lambda: IntegersAndFlags().eval(), example, None)


def export_module(path: Path, module: nn.Module, example: Sequence[torch.Tensor], *, batch: int | None = None) -> Path:
    """Any module, in the format that the suffix names; not kept. `batch` fixes it, else dimension 0 is dynamic."""
    path.write_bytes(_export(path.suffix, module, tuple(example), batch))
    return path


def _write(
    path: Path, key: str, make: Callable[[], nn.Module], example: tuple[torch.Tensor, ...], batch: int | None
) -> Path:
    kept, key = _kept_exports(), path.suffix + key
    if key not in kept:
        kept[key] = _export(path.suffix, make(), example, batch)
    path.write_bytes(kept[key])
    return path


@functools.cache
def _kept_exports() -> dict[str, bytes]:
    return {}


def _export(suffix: str, module: nn.Module, example: tuple[torch.Tensor, ...], batch: int | None) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        path = Path(folder, f"model{suffix}")
        if suffix == ".pt2":
            torch.export.save(_exported(module, example, batch), path)
        elif suffix == ".pt":
            traced = torch.jit.trace(module, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, path)
        elif suffix == ".onnx":
            _save_onnx(module, example, batch, path)
        else:
            raise ValueError(f"{suffix}: not a model format")
        return path.read_bytes()


def _exported(module: nn.Module, example: tuple[torch.Tensor, ...], batch: int | None) -> torch.export.ExportedProgram:
    dim = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = None if batch else tuple({0: dim} for _ in example)
    return torch.export.export(module, example, dynamic_shapes=shapes)


def _save_onnx(module: nn.Module, example: tuple[torch.Tensor, ...], batch: int | None, path: Path) -> None:
    names = [f"input_{i}" for i in range(len(example))]
    axes = None if batch else {name: {0: "batch"} for name in [*names, "output"]}
    torch.onnx.export(
        module, example, path, input_names=names, output_names=["output"], dynamic_axes=axes, dynamo=False
    )
