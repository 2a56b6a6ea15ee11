"""Convolutions with what stands around them as one operator each: the same function, and the operators are gone."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from ensemble_worker.backends import convolutions, export_graph, torch_export
from ensemble_worker.backends.loaded import Call
from tests.support import models
from tests.support.convolutional import (
    PIXELS,
    Block,
    ComputedWeights,
    GroupedSum,
    Padded,
    Positions,
    Shuffled,
    Through,
    Two,
    TwoInputs,
    decoder,
    late_layers,
    random_layer,
    with_statistics,
)

FUSED = "mkldnn::_convolution_pointwise"
PLAIN = {"aten::conv2d", "aten::convolution", "aten::mkldnn_convolution", "aten::_slow_conv2d_forward"}
BATCHES = (1, 2, 3, 7)


# Networks of which nothing but the fused operator is left, with how many there are.
WHOLE: dict[str, tuple[nn.Module, int]] = {
    "relu": (Through(torch.relu), 1),
    "relu6": (Through(functional.relu6), 1),
    "hardtanh": (Through(lambda y: functional.hardtanh(y, -0.5, 0.25)), 1),
    "leaky relu": (Through(lambda y: functional.leaky_relu(y, 0.2)), 1),
    "sigmoid": (Through(torch.sigmoid), 1),
    "tanh": (Through(torch.tanh), 1),
    "silu": (Through(functional.silu), 1),
    "hardswish": (Through(functional.hardswish), 1),
    "hardsigmoid": (Through(functional.hardsigmoid), 1),
    "gelu": (Through(functional.gelu), 1),
    "gelu by tanh": (Through(lambda y: functional.gelu(y, approximate="tanh")), 1),
    "no bias, no activation": (Through(lambda y: y, bias=False), 1),
    "dilated": (Through(torch.relu, dilation=2, padding=2), 1),
    "as large as before": (Through(torch.relu, kernel_size=4, padding="same"), 1),
    "without padding": (Through(torch.relu, kernel_size=(2, 5), padding="valid"), 1),
    "oblong": (Through(torch.relu, kernel_size=(1, 5), stride=(2, 1), padding=(0, 3)), 1),
    "residual": (nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), Block(8)), 5),
    "residual, linear": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(8, norm_first=True)), 3),
    "two": (Two(), 2),
    "even padding": (Padded((1, 1, 1, 1)), 1),
    "more at the end": (Padded((0, 1, 0, 1)), 1),
    "more at the beginning": (Padded((2, 0, 1, 0), kernel_size=5), 1),
    "padding twice": (Padded((0, 1, 1, 2), padding=1), 1),
}
GONE = {
    "aten::pad",
    "aten::constant_pad_nd",
    "aten::batch_norm",
    "aten::add",
    "aten::add_",
    "aten::relu",
    "aten::relu_",
    "aten::clamp",
}
# Networks of which a part stays as it was, and that part.
PARTLY: dict[str, tuple[nn.Module, str]] = {
    "activation that cannot follow a sum": (Through(lambda y: functional.silu(y + y.flip(1))), "aten::silu"),
    "positions": (Positions(), "aten::add"),
    "with itself": (Through(lambda y: torch.relu(y + y)), "aten::add"),
    "a number": (Through(lambda y: torch.relu(y + 1.0)), "aten::add"),
    "used twice": (Through(lambda y: torch.cat([y, torch.relu(y)], 1)), "aten::relu"),
    "not of zeros": (
        nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 8, 3), nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)),
        "aten::constant_pad_nd",
    ),
    "cropped": (nn.Sequential(nn.ConstantPad2d((0, -1, 0, 1), 0.0), nn.Conv2d(3, 8, 3)), "aten::constant_pad_nd"),
    "uneven and dilated": (Padded((0, 1, 0, 1), dilation=2), "aten::constant_pad_nd"),
    "decoder": (decoder(), "aten::conv_transpose2d"),
    "batch norm of a sum": (nn.Sequential(Two(), nn.BatchNorm2d(8)), "aten::batch_norm"),
    "shuffled": (Shuffled(), "aten::reshape"),
    "sum of groups": (nn.Sequential(nn.Conv2d(3, 8, 1), GroupedSum()), "aten::add"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_stands_around_is_part_of_the_operator(name: str, tmp_path: Path) -> None:
    network, count = WHOLE[name]
    called = _agrees(with_statistics(network), tmp_path)
    assert called[FUSED] == count
    assert not called.keys() & (PLAIN | GONE)


@pytest.mark.parametrize("name", PARTLY)
def test_what_cannot_be_part_of_it_stays(name: str, tmp_path: Path) -> None:
    network, stays = PARTLY[name]
    called = _agrees(with_statistics(network), tmp_path)
    assert called[FUSED]
    assert called[stays]


def test_a_decomposed_program(tmp_path: Path) -> None:
    network = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(8), nn.BatchNorm2d(8)))
    dim = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        program = torch.export.export(network, (torch.randn(2, 3, PIXELS, PIXELS),), dynamic_shapes=({0: dim},))
        torch.export.save(program.run_decompositions(), tmp_path / "m.pt2")
    called = _compare(network, _form(tmp_path / "m.pt2"))
    assert called[FUSED] == 3
    assert not called.keys() & (PLAIN | {"aten::add", "aten::relu"})


def test_random_networks(tmp_path: Path) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        first = nn.Conv2d(3, 8, chance.choice((1, 2, 3)), padding=chance.randrange(2))
        _agrees(with_statistics(nn.Sequential(first, *(random_layer(chance) for _ in range(6)))), tmp_path)


def test_a_fixed_batch(tmp_path: Path) -> None:
    network, example = with_statistics(Block(3)), torch.randn(3, 3, PIXELS, PIXELS)
    call = _form(models.export_module(tmp_path / "m.pt2", network, [example], batch=3), [example])
    with torch.inference_mode():
        torch.testing.assert_close(call(example)[0], network(example), rtol=0, atol=2e-5)


def test_images_of_any_size_in_the_file(tmp_path: Path) -> None:
    """The file tells no shape of a row then; the resource does."""
    network, x = with_statistics(Block(3)), torch.randn(2, 3, PIXELS, PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        dims = {
            0: torch.export.Dim("batch", min=1, max=64),
            2: torch.export.Dim("height"),
            3: torch.export.Dim("width"),
        }
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=(dims,)), tmp_path / "m.pt2")
    assert _compare(network, _form(tmp_path / "m.pt2"))[FUSED] == 2


def test_several_inputs_and_a_program_that_torch_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights for numbers of rows come after all inputs, wherever the graph has its own."""
    network = TwoInputs().eval()
    few = [torch.randn(3, 3, 8, 8), torch.randn(3, 192, 8, 8)]
    path = models.export_module(tmp_path / "m.pt2", network, few)

    def refuse(*_: object) -> None:
        raise export_graph.NotCovered("for a test")

    for read in (export_graph.read, refuse):
        monkeypatch.setattr(export_graph, "read", read)
        call = _form(path, few)
        with torch.inference_mode():
            for rows in BATCHES:
                inputs = torch.randn(rows, 3, 8, 8), torch.randn(rows, 192, 8, 8)
                torch.testing.assert_close(call(*inputs)[0], network(*inputs), rtol=0, atol=2e-5)


def test_what_others_read_is_not_written_over(tmp_path: Path) -> None:
    network = Through(lambda y: torch.stack([y.flatten(1), y.relu_().flatten(1)])).eval()
    with pytest.raises(convolutions.NotFusable, match="may write into what others read"):
        _agrees(network, tmp_path)


def test_computed_weights_are_not_covered(tmp_path: Path) -> None:
    with pytest.raises(convolutions.NotFusable, match="no convolution"):
        _agrees(ComputedWeights().eval(), tmp_path)


def test_double_precision_is_not_covered(tmp_path: Path) -> None:
    network = Through(torch.relu).double().eval()
    few = [torch.randn(2, 3, PIXELS, PIXELS, dtype=torch.float64)]
    with pytest.raises(convolutions.NotFusable, match="no convolution"):
        _form(models.export_module(tmp_path / "m.pt2", network, few), few)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no BF16")
@pytest.mark.parametrize("statistics", [torch.bfloat16, torch.float32])
def test_half_precision(tmp_path: Path, statistics: torch.dtype) -> None:
    """Batch norms are often left in single precision."""
    network = with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Block(8), GroupedSum())).bfloat16()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.to(statistics)
    x = torch.randn(3, 3, PIXELS, PIXELS).bfloat16()
    call = _form(models.export_module(tmp_path / "m.pt2", network, [x]), [x])
    with torch.inference_mode():
        exact = network.float()(x.float())
        torch.testing.assert_close(call(x)[0].float(), exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_many_rows_in_many_threads(tmp_path: Path) -> None:
    network, few = late_layers(), [torch.randn(2, 3, 8, 8)]
    call = _form(models.export_module(tmp_path / "m.pt2", network, few), few)

    def agrees(rows: int) -> None:
        with torch.inference_mode():
            x = torch.randn(1, 3, 8, 8).expand(rows, -1, -1, -1).contiguous()
            torch.testing.assert_close(call(x)[0], network(x[:1]).expand(rows, -1), rtol=0, atol=2e-5)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(agrees, [5, 6, 7, 5, 6, 7, 1100]))


def test_weights_are_never_laid_out_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the number of rows: during a call that takes many times as long as the layer."""
    few = [torch.randn(2, 3, 8, 8)]
    call = _form(models.export_module(tmp_path / "m.pt2", late_layers(), few), few)
    with torch.inference_mode():
        for rows in (*range(1, 20), 33, 64, 130):
            x = torch.randn(rows, 3, 8, 8)
            call(x)
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
                call(x)
    lines = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert len([line for line in lines if ",convolution," in line]) == 22 * 6
    assert [line for line in lines if ",reorder," in line] == []


def _form(path: Path, few: Sequence[torch.Tensor] = ()) -> Call:
    loaded = torch_export.load(path, torch.device("cpu"))
    (form,) = (form for form in loaded.forms if form.name == "fused convolutions")
    with torch.inference_mode():
        return form.make(few or [torch.randn(3, 3, PIXELS, PIXELS)])


def _agrees(network: nn.Module, folder: Path) -> Counter[str]:
    path = models.export_module(folder / "m.pt2", network, [torch.randn(2, 3, PIXELS, PIXELS)])
    return _compare(network, _form(path))


def _compare(network: nn.Module, call: Call) -> Counter[str]:
    """Compare a form with its network; what it calls for each batch."""
    called: Counter[str] = Counter()
    with torch.inference_mode():
        for rows in BATCHES:
            x = torch.randn(rows, 3, PIXELS, PIXELS)
            kept = x.clone()
            torch.testing.assert_close(call(x)[0], network(x.clone()), rtol=0, atol=2e-5)
            assert torch.equal(x, kept)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call(x)
    for event in seen.events() or ():
        called[event.name] += 1
    return called
