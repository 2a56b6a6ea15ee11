"""Convolutions of a graph as one operator of oneDNN each: with their padding, batch norm, sum and activation.

PyTorch calls an operator for each of these, and each goes through all of the images again; padding is a copy, and most
point-wise convolutions in channels-last order are left to a general matrix product. Here images keep that order from
layer to layer, and weights are laid out before (`packing`).

Finite rows give what the graph gives. NaN and infinite ones need not: oneDNN's ReLU makes 0 of NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, List, Optional, TypeAlias, Union  # noqa: UP035  # TorchScript reads these

import torch
from torch import fx
from torch.nn import functional

from ensemble_worker.backends.graphs import held_tensor
from ensemble_worker.backends.loaded import Call
from ensemble_worker.backends.packing import Weights, WithWeights
from ensemble_worker.backends.scripting import scripted

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.convolution.default})
BATCH_NORMS = frozenset({aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default})
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})

# By the kernels' name, with their parameters and the algorithm.
Activation = tuple[str, tuple[float, ...], str]
NO_ACTIVATION: Activation = ("none", (), "")
ACTIVATIONS: dict[Any, Callable[[Mapping[str, Any]], Activation]] = {
    aten.relu.default: lambda _: ("relu", (), ""),
    aten.relu6.default: lambda _: ("hardtanh", (0.0, 6.0), ""),
    aten.hardtanh.default: lambda given: ("hardtanh", (float(given["min_val"]), float(given["max_val"])), ""),
    aten.leaky_relu.default: lambda given: ("leaky_relu", (float(given["negative_slope"]),), ""),
    aten.sigmoid.default: lambda _: ("sigmoid", (), ""),
    aten.tanh.default: lambda _: ("tanh", (), ""),
    aten.silu.default: lambda _: ("swish", (), ""),
    aten.hardswish.default: lambda _: ("hardswish", (), ""),
    aten.hardsigmoid.default: lambda _: ("hardsigmoid", (), ""),
    aten.gelu.default: lambda given: ("gelu", (), str(given["approximate"])),
}

# What TorchScript calls the type that operators call Scalar.
Scalar: TypeAlias = Union[int, float, complex]  # noqa: UP007
Values = dict[fx.Node, tuple[torch.Size, torch.dtype]]


class NotFusable(Exception):
    """The graph has no convolution that could gain, or writes into what others read; the message says which."""


@dataclass(slots=True)
class _Convolution:
    """What becomes one operator in place of the node `last`; `addend` is added before the activation.

    There are zeros `around` its images: left, right, top, bottom.
    """

    images: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: list[int]
    around: list[int]
    dilation: list[int]
    groups: int
    last: fx.Node
    addend: fx.Node | None = None
    activation: Activation = NO_ACTIVATION

    def weights(self, shape: torch.Size, sample_rows: int) -> Weights:
        """The weights for images of this shape in a sample of so many rows.

        oneDNN's padding is alike on both sides: where one side has fewer zeros, the kernel gets zeros of its own there.
        """
        left, right, top, bottom = self.around
        wider, higher = left - right, top - bottom
        zeros = (max(-wider, 0), max(wider, 0), max(-higher, 0), max(higher, 0))
        plain = functional.pad(self.weight, zeros).contiguous(memory_format=torch.channels_last)
        padding = [max(top, bottom), max(left, right)]
        return Weights(plain, padding, self.stride, self.dilation, self.groups, shape, sample_rows)


def fused(graph: fx.GraphModule, sample: Sequence[torch.Tensor], *, fixed_batch: bool) -> Call:
    """The same function as `graph`, which is run once on `sample`: a few rows, or its fixed batch.

    Raises NotFusable if no convolution of images has weights of its own, or the graph writes into what others read.
    """
    module = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    _make_functional(module.graph)
    replaced, changing = _replace(module, sample, fixed_batch=fixed_batch)
    if not replaced:
        raise NotFusable("it has no convolution of images with weights of its own")
    call = scripted(fx.GraphModule(module, module.graph))
    return WithWeights(call, changing) if changing else call


def _make_functional(graph: fx.Graph) -> None:
    """Replace what writes into its first argument by what does not. Raises NotFusable where somebody could tell."""
    for node in graph.nodes:
        target: Any = node.target
        if target in VIEWS:
            # In channels-last order there may be no such view.
            node.target = aten.reshape.default
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        name = target._schema.name.removeprefix("aten::")
        twin = getattr(getattr(aten, name.removesuffix("_"), None), target._overloadname, None)
        if not name.endswith("_") or twin is None or not _is_only_for(node.args[0], node):
            raise NotFusable(f"{target} may write into what others read")
        node.target = twin


def _is_only_for(value: Any, user: fx.Node) -> bool:
    """Whether a tensor is computed, in memory of its own, for one user alone."""
    if not isinstance(value, fx.Node) or list(value.users) != [user]:
        return False
    target = value.target
    return isinstance(target, torch._ops.OpOverload) and not any(given.alias_info for given in target._schema.arguments)


class _Recorder(fx.Interpreter):
    """Runs a graph, and records the shape and the datatype of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        """What a node gives."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.values[n] = value.shape, value.dtype
        return value


def _replace(module: fx.GraphModule, sample: Sequence[torch.Tensor], *, fixed_batch: bool) -> tuple[int, list[Weights]]:
    """Replace the convolutions of a graph: how many there were, and the weights that it takes after its inputs."""
    recorder = _Recorder(module)
    recorder.run(*sample)
    values, rows, replaced = recorder.values, len(sample[0]), 0
    changing: list[Weights] = []
    nodes = list(module.graph.nodes)
    last_input = [node for node in nodes if node.op == "placeholder"][-1]
    for node in nodes:
        one = _found(module, node, values, rows) if node.target in CONVOLUTIONS else None
        if one is None:
            continue
        weights = one.weights(values[one.images][0], rows)
        if not fixed_batch and weights.change():
            with module.graph.inserting_after(last_input):
                last_input = weight = module.graph.placeholder(f"packed_weight_{replaced}")
            changing.append(weights)
        else:
            weight = _held(module, f"packed_weight_{replaced}", weights.packed(rows), one.last)
        bias = None if one.bias is None else _held(module, f"packed_bias_{replaced}", one.bias, one.last)
        made = _call(module.graph, one, (weight, bias, weights.padding, one.stride, one.dilation, one.groups))
        values[made] = values[one.last]
        one.last.replace_all_uses_with(made)
        replaced += 1
    module.graph.eliminate_dead_code()
    return replaced, changing


def _held(module: fx.GraphModule, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    """A tensor that becomes the module's own."""
    module.register_buffer(name, tensor)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _found(module: fx.GraphModule, node: fx.Node, values: Values, sample_rows: int) -> _Convolution | None:
    """A convolution with what stands around it; None if it is of another kind, or its weights are not the model's."""
    given = _arguments(node)
    images, weight, bias = given["input"], held_tensor(module, given["weight"]), held_tensor(module, given["bias"])
    if weight is None or weight.dim() != 4 or weight.dtype not in DTYPES or (bias is None) != (given["bias"] is None):
        return None
    shape = values[images][0]
    if len(shape) != 4 or shape[0] % sample_rows or given.get("transposed"):
        return None
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    padding = given["padding"]
    if isinstance(padding, str):
        all_around = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        around = [side for all_zeros in all_around[::-1] for side in (all_zeros // 2, all_zeros - all_zeros // 2)]
    else:
        around = [side for zeros in _pair(padding)[::-1] for side in (zeros, zeros)]
    if not _can_pad(around, dilation):
        return None
    one = _Convolution(images, weight, bias, stride, around, dilation, given["groups"], node)
    _take_padding(one)
    _take_batch_norm(one, module)
    _take_sum(one, values)
    _take_activation(one)
    return one


def _can_pad(around: Sequence[int], dilation: Sequence[int]) -> bool:
    """Zeros of the kernel's own stand next to its others, so they do for zeros around images if it is not dilated."""
    left, right, top, bottom = around
    return min(around) >= 0 and (dilation == [1, 1] or (left == right and top == bottom))


def _take_padding(one: _Convolution) -> None:
    """Zeros around the images that another operator puts there for this one alone."""
    pad = one.images
    if pad.target not in PADS or len(pad.users) > 1:
        return
    given = _arguments(pad)
    zeros = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    if not zeros or len(given["pad"]) != 4 or not _can_pad(given["pad"], one.dilation):
        return
    one.around = [zeros + more for zeros, more in zip(one.around, given["pad"], strict=True)]
    one.images = given["self"]


def _take_batch_norm(one: _Convolution, module: fx.GraphModule) -> None:
    """A batch norm with the model's own statistics, folded in single precision whatever the layer's is."""
    node = _only_user(one.last)
    if node is None or node.target not in BATCH_NORMS:
        return
    given = _arguments(node)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, scale, shift = (held_tensor(module, given[name]) for name in names)
    last: fx.Node | None = node
    if node.target is not aten.batch_norm.default:
        # It also gives what training saves.
        items = [item for item in node.users if item.users]
        last = items[0] if len(items) == 1 and items[0].args[1] == 0 else None
    if last is None or mean is None or variance is None or given.get("training") or given["input"] is not one.last:
        return
    if (scale is None, shift is None) != (given["weight"] is None, given["bias"] is None):
        return
    dtype, factor = one.weight.dtype, torch.rsqrt(variance.float() + given["eps"])
    factor = factor if scale is None else factor * scale
    bias = ((0.0 if one.bias is None else one.bias.float()) - mean.float()) * factor
    one.bias = (bias if shift is None else bias + shift).to(dtype)
    one.weight = (one.weight.float() * factor.reshape(-1, 1, 1, 1)).to(dtype)
    one.last = last


def _take_sum(one: _Convolution, values: Values) -> None:
    """A sum with a tensor of the same shape; of several groups of channels the kernel adds nothing."""
    node = _only_user(one.last)
    if one.groups != 1 or node is None or node.target is not aten.add.Tensor or node.kwargs:
        return
    others = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not one.last]
    after = _only_user(node)
    # The kernel that adds knows but one activation.
    if after is not None and after.target in ACTIVATIONS and after.target is not aten.relu.default:
        return
    if len(others) == 1 and values.get(others[0]) == values[one.last]:
        one.addend, one.last = others[0], node


def _take_activation(one: _Convolution) -> None:
    """The activation, if nobody else sees what comes before it."""
    node = _only_user(one.last)
    if node is not None and node.target in ACTIVATIONS:
        one.activation = ACTIVATIONS[node.target](_arguments(node))
        one.last = node


def _call(graph: fx.Graph, one: _Convolution, layer: tuple[Any, ...]) -> fx.Node:
    """The operator of a `layer`'s weights and sizes, where the last of what it replaces is."""
    with graph.inserting_before(one.last):
        name, numbers, algorithm = one.activation
        scalars: fx.Node | list[Any] = graph.call_function(_scalars, ([*numbers],)) if numbers else []
        if one.addend is None:
            single = mkldnn._convolution_pointwise.default
            return graph.call_function(single, (one.images, *layer, name, scalars, algorithm))
        activation = None if one.activation is NO_ACTIVATION else name
        summed = mkldnn._convolution_pointwise.binary
        return graph.call_function(summed, (one.images, one.addend, *layer, "add", 1.0, activation, scalars, None))


def _scalars(numbers: List[float]) -> List[Optional[Scalar]]:  # noqa: UP006, UP045
    """Numbers as the operators take them."""
    scalars: List[Optional[Scalar]] = []  # noqa: UP006, UP045
    for number in numbers:
        scalars.append(number)  # noqa: PERF402  # TorchScript takes no list for one of another type
    return scalars


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _pair(numbers: Sequence[int]) -> list[int]:
    return [*numbers] if len(numbers) == 2 else [*numbers] * 2


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by name."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}
