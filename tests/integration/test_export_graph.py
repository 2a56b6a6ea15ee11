"""`.pt2` programs read without torch.export: the same function, and no more of torch than serving needs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemble_worker.backends import export_graph, torch_export
from ensemble_worker.errors import InvalidArchive
from ensemble_worker.inspect_export import inspect_export
from tests.support import models

CPU = torch.device("cpu")


class Attention(nn.Module):
    """Named and optional arguments, lists of tensors, sizes that are computed, a constant and a tied weight."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.linspace(1, 2, 8), persistent=False)
        self.out = nn.Linear(8, 16, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.embed(ids)) * self.scale + torch.tensor(0.5)
        mixed, _ = self.mix(x, x, x, need_weights=False)
        first, second = mixed.chunk(2, -1)
        y = torch.cat([second, first], dim=-1).reshape(ids.shape[0] * 4, 8)
        values, _ = self.out(y).view(ids.shape[0], 4, 16).topk(3, dim=-1)
        return values.flatten(1), mixed.mean((1, 2)).unsqueeze(-1).clamp(min=-float("inf"))


class Casts(nn.Module):
    """Datatypes, devices and layouts among the arguments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.arange(4, dtype=torch.float64, device=x.device)
        made = torch.zeros(x.shape[0], 4, dtype=torch.float16).to(torch.float64) + grid
        picked = x.double()[:, torch.tensor([3, 1, 0, 2])]
        return torch.where(picked > 0, picked, made).contiguous()


class Counting(nn.Module):
    """Changes a buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * 2 + self.calls


class Branching(nn.Module):
    """Control flow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))
        return made


CASES: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "mlp": (models.make_mlp(seed=1), torch.randn(5, 64)),
    "cnn": (models.make_cnn(seed=1), torch.randn(5, 3, 32, 32)),
    "attention": (Attention(), torch.randint(0, 16, (5, 4))),
    "casts": (Casts(), torch.randn(5, 4)),
    "doubles": (nn.Linear(4, 4).double(), torch.randn(5, 4, dtype=torch.float64)),
    "bfloats": (nn.Linear(4, 4).bfloat16(), torch.randn(5, 4, dtype=torch.bfloat16)),
}


def _flat(answer: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [answer] if isinstance(answer, torch.Tensor) else list(answer)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_module_does(tmp_path: Path, case: str) -> None:
    module, rows = CASES[case]
    module.eval()
    path = models.export_module(tmp_path / "m.pt2", module, [rows[:2]])
    graph = export_graph.read(inspect_export(path), CPU)
    with torch.inference_mode():
        for count in (5, 1, 2):
            torch.testing.assert_close(_flat(graph(rows[:count])), _flat(module(rows[:count])))


def test_what_it_does_not_know_is_left_to_torch(tmp_path: Path) -> None:
    rows = torch.ones(2, 3)
    path = models.export_module(tmp_path / "m.pt2", Branching(), [rows])
    with pytest.raises(export_graph.NotCovered, match="higher_order"):
        export_graph.read(inspect_export(path), CPU)
    torch.testing.assert_close(_flat(torch_export.load(path, CPU).call(rows)), [rows + 1])


def test_changes_of_buffers_that_the_program_returns_are_left_to_torch(tmp_path: Path) -> None:
    rows = torch.ones(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        torch.export.save(torch.export.export(Counting(), (rows,)).run_decompositions(), tmp_path / "m.pt2")
    with pytest.raises(export_graph.NotCovered, match="buffer_mutation"):
        export_graph.read(inspect_export(tmp_path / "m.pt2"), CPU)
    call = torch_export.load(tmp_path / "m.pt2", CPU).call
    with torch.inference_mode():
        assert [float(_flat(call(rows))[0][0, 0]) for _ in range(3)] == [3, 4, 5]


def test_a_weight_that_is_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    inspected = inspect_export(models.export_mlp(tmp_path / "m.pt2", seed=1))
    records = inspected.archive.records
    records["data/weights/weight_0"], records["data/weights/weight_1"] = (
        records["data/weights/weight_1"],
        records["data/weights/weight_0"],
    )
    with pytest.raises(InvalidArchive, match="weight_0 does not hold a tensor of shape"):
        export_graph.read(inspected, CPU)


LOADS = """
import sys, torch
from pathlib import Path
from ensemble_worker.backends import torch_export
torch_export.load(Path(sys.argv[1]), torch.device("cpu")).call(torch.zeros(2, 64))
print(sorted(name for name in ("torch._dynamo", "torch._export.serde.serialize") if name in sys.modules))
"""


def test_torchs_compiler_is_not_imported(tmp_path: Path) -> None:
    """It takes seconds and a hundred MiB, in every worker."""
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    done = subprocess.run([sys.executable, "-c", LOADS, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
