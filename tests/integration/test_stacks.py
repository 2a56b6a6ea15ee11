"""Members of one architecture that run as one: the answers are each member's own, and what differs is left alone."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ensemble_contract.plan import Instance, ModelSource, WorkerPlan, encode_plan
from ensemble_contract.tensors import TensorSpec
from ensemble_worker import devices, predictor, stacks
from ensemble_worker.backends import export_graph, stacking, torch_export
from ensemble_worker.backends.cpu import CpuPredictor, CpuStack
from ensemble_worker.stacks import Part, Stacks
from tests.support import models
from tests.support.data_plane import Worker, ask_unix, gateway_plan, serving, wait_until
from tests.support.http_client import WIDTH, infer, rows
from tests.support.plane_members import X as PLANE_X
from tests.support.plane_members import Y as PLANE_Y

X, Y = (TensorSpec("x", "FP32", (64,)),), (TensorSpec("y", "FP32", (10,)),)
DEVICE = devices.cpu_device(0, (0,), 1 << 30)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on a busy machine is no matter of right and wrong."""
    monkeypatch.setattr(stacks, "_is_quicker", lambda *_: True)


class Normalised(nn.Module):
    """A perceptron with what people put between its layers, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 10)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x / 16 - 0.5).flatten(1)
        hidden = self.drop(nn.functional.gelu(self.first(x)))
        hidden = torch.tanh(self.second(hidden)) * 0.5 + hidden
        return torch.log_softmax(self.last(hidden), -1)


def bottleneck() -> nn.Module:
    """Narrow layers first, in the middle and last, with a bias and without."""
    return nn.Sequential(
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3, bias=False), nn.Linear(3, 1)
    )


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) @ self.layer.weight
        return y


def _graph(path: Path, module: nn.Module, *shape: int) -> torch.fx.GraphModule:
    call = torch_export.load(
        models.export_module(path, module.eval(), [torch.zeros(2, *shape)]), torch.device("cpu")
    ).call
    assert isinstance(call, torch.fx.GraphModule)
    return call


def _load(
    path: Path, inputs: Sequence[TensorSpec] = X, batch_size: int = 16, activation: str = "softmax"
) -> CpuPredictor:
    source = ModelSource(path.stem, "d", path.as_uri(), "torch-export", activation)
    made = predictor.load(path, source, tuple(inputs), Y, DEVICE, batch_size)
    assert isinstance(made, CpuPredictor)
    return made


@pytest.fixture
def mlps(tmp_path: Path) -> list[CpuPredictor]:
    return [_load(models.export_mlp(tmp_path / f"m{seed}.pt2", seed=seed, hidden=32)) for seed in range(4)]


@pytest.mark.parametrize("module", [Normalised, bottleneck])
def test_a_perceptron_with_all_that_people_put_into_one_is_stacked(
    tmp_path: Path, module: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(1)
    graphs = [_graph(tmp_path / f"{one}.pt2", module(), 64) for one in range(3)]
    networks = [stacking.layers_of(graph) for graph in graphs]
    assert all(networks)
    assert len({one.architecture for one in networks if one}) == 1
    stack = stacking.Stack([one for one in networks if one])
    for count in (1, 7):
        x = torch.randn(count, 64)
        for first, end in ((0, 3), (1, 3), (2, 3)):
            (got,) = stack.run([x], first, end)
            wanted = torch.stack([graph(x)[0] for graph in graphs[first:end]])
            torch.testing.assert_close(got, wanted)


def test_a_program_that_torch_has_to_read_is_stacked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are parameters of modules, where ours are buffers of the graph."""

    def refuse(*_: object) -> None:
        raise export_graph.NotCovered("another version of the format")

    monkeypatch.setattr(export_graph, "read", refuse)
    graph = _graph(tmp_path / "m.pt2", Normalised(), 64)
    network = stacking.layers_of(graph)
    assert network is not None
    x = torch.randn(3, 64)
    torch.testing.assert_close(stacking.Stack([network, network]).run([x], 0, 2)[0][1], graph(x)[0].detach())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: models.make_cnn(seed=1), (3, 32, 32)),
        (TiedWeights, (10,)),
        (lambda: nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10)), (10,)),
        (lambda: nn.Sequential(nn.Linear(10, 10), nn.Softmax(0)), (10,)),
        (lambda: nn.Linear(1100, 1000), (1100,)),
        (nn.ReLU, (10,)),
    ],
    ids=["convolutions", "weights used twice", "other weights", "softmax over rows", "large", "no layer"],
)
def test_what_is_no_small_perceptron_is_not_stacked(
    tmp_path: Path, module: Callable[[], nn.Module], shape: Sequence[int]
) -> None:
    assert stacking.layers_of(_graph(tmp_path / "m.pt2", module(), *shape)) is None


def test_any_neighbours_answer_as_each_of_them_does(mlps: list[CpuPredictor]) -> None:
    stack = CpuStack(mlps)
    for count in (1, 5, 16):
        x = np.random.default_rng(count).standard_normal((count, 64), np.float32)
        for first, end in ((0, 4), (1, 3), (3, 4)):
            (output,) = stack.run([x], first, end)
            assert output.flags.c_contiguous
            for got, member in zip(output, mlps[first:end], strict=True):
                np.testing.assert_allclose(got, member.run([x])[0], rtol=1e-5, atol=1e-6)


def test_instances_of_a_batch_run_with_their_neighbours(mlps: list[CpuPredictor]) -> None:
    made = Stacks(dict(zip((11, 12, 13, 14), mlps, strict=True)))

    def positions(*instances: int) -> list[tuple[int, ...]]:
        return [part.positions for part in made.parts(instances, 3)]

    assert positions(11, 12, 13, 14) == [(0, 1, 2, 3)]
    assert positions(13, 11, 12) == [(1, 2, 0)]
    assert positions(14, 12, 11) == [(2, 1), (0,)]
    assert made.parts((12,), 3) == (Part((0,), None),)
    # 15 came after the stacks were made.
    assert positions(15, 11, 12) == [(0,), (1, 2)]
    x = np.ones((3, 64), np.float32)
    wanted = [member.run([x])[0] for member in mlps[1:3]]
    for instances, where, pieces in (((13, 12), (1, 0), wanted), ((12, 13), (0, 1), [np.stack(wanted)])):
        (part,) = made.parts(instances, 3)
        assert part.positions == where
        assert part.run is not None
        for got, piece in zip(part.run([x]), pieces, strict=True):
            np.testing.assert_allclose(got[0], piece, rtol=1e-5, atol=1e-6)


def test_a_stack_runs_batches_for_which_it_is_quicker(
    mlps: list[CpuPredictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_is_quicker", lambda _stack, _members, batch: len(batch[0]) <= 8)
    made = Stacks(dict(enumerate(mlps)))
    assert len(made.parts((0, 1, 2, 3), 8)) == 1
    assert len(made.parts((0, 1, 2, 3), 9)) == 4


def test_members_of_other_shapes_or_activations_run_apart(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "a.pt2", seed=1, hidden=32)
    made = Stacks(
        {
            1: _load(path),
            2: _load(models.export_mlp(tmp_path / "b.pt2", seed=2, hidden=48)),
            3: _load(path, activation="none"),
            4: _load(models.export_mlp(tmp_path / "c.pt2", seed=3, hidden=32)),
        }
    )
    assert [part.positions for part in made.parts((1, 2, 3, 4), 1)] == [(1,), (2,), (0, 3)]


def test_a_stack_that_answers_otherwise_is_not_used(mlps: list[CpuPredictor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CpuStack, "run", lambda self, inputs, first, end: [np.stack([member.run(inputs)[0] for member in mlps[::-1]])]
    )
    assert len(Stacks(dict(enumerate(mlps))).parts((0, 1, 2, 3), 1)) == 4


def _times(folder: Path, factor: int) -> ModelSource:
    """A perceptron that gives its rows times a number."""
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.copy_(factor * torch.eye(WIDTH))
        layer.bias.zero_()
    name = f"times{factor}"
    path = models.export_module(folder / f"{name}.pt2", layer.eval(), [torch.zeros(2, WIDTH)])
    return ModelSource(name, f"digest-{name}", path.as_uri(), "torch-export")


async def test_answers_stay_right_while_members_of_a_stack_come_and_go(tmp_path: Path) -> None:
    sources = {source.name: source for source in (_times(tmp_path, factor) for factor in range(1, 6))}

    def plan(generation: int, *names: str) -> WorkerPlan:
        placed = tuple(Instance(name, 16, sources[name].digest) for name in names)
        return WorkerPlan(generation, "any", "solo", PLANE_X, PLANE_Y, tuple(sources[n] for n in names), placed)

    async def asked(*factors: int) -> None:
        served = [f"times{factor}" for factor in factors]
        x = rows(40)
        async with serving(gateway_plan([worker.address], sources, *served)) as local, await local.connect() as client:
            for _ in range(20):
                np.testing.assert_allclose((await client.ask(infer(x))).y(), np.mean(factors) * x, rtol=1e-5, atol=1e-6)

    worker = Worker(tmp_path, plan(1, "times1", "times2", "times3", "times4"))
    try:
        worker.wait_ready()
        wait_until(lambda: "4 members of one architecture" in worker.text())
        await asked(1, 2, 3, 4)
        await asked(4, 2)
        status, text = ask_unix(worker.admin, "PUT", "/v1/plan", encode_plan(plan(2, "times1", "times4", "times5")))
        assert status == 202, text
        wait_until(lambda: "3 members of one architecture" in worker.text())
        await asked(1, 4, 5)
        assert worker.text().count("members of one architecture") == 2, "they are stacked once for what has changed"
        assert "Traceback" not in worker.text()
    finally:
        worker.end()


def test_what_is_not_wanted_any_more_keeps_nothing_from_being_stacked(tmp_path: Path) -> None:
    """A member that is still being fetched, from a server that never answers, when the next plan leaves it out."""
    one, other = _times(tmp_path, 1), _times(tmp_path, 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lost = ModelSource(
            "lost", "digest-lost", f"http://127.0.0.1:{silent.getsockname()[1]}/lost.pt2", "torch-export"
        )

        def plan(generation: int, *sources: ModelSource) -> WorkerPlan:
            placed = tuple(Instance(source.name, 16, source.digest) for source in sources)
            return WorkerPlan(generation, "any", "solo", PLANE_X, PLANE_Y, sources, placed)

        def ready() -> int:
            return ask_unix(worker.admin, "GET", "/v1/plan")[1].count(b'"ready"')

        worker = Worker(tmp_path, plan(1, lost, one, other))
        try:
            wait_until(lambda: worker.admin.exists() and ready() == 2)
            assert "members of one architecture" not in worker.text()
            status, text = ask_unix(worker.admin, "PUT", "/v1/plan", encode_plan(plan(2, one, other)))
            assert status == 202, text
            wait_until(lambda: "2 members of one architecture" in worker.text())
        finally:
            worker.end()
