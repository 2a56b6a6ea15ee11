"""Convolutions of a graph as one operator of oneDNN each: with their padding, batch norm, sum and activation.

PyTorch calls an operator for each of these, and each goes through all of the images again; padding is a copy, and most
point-wise convolutions in channels-last order are left to a general matrix product. Here images keep that order from
layer to layer, and weights are laid out as the kernels want them before a call, in which it would take many times as
long as the layer. Which layout that is can depend on the numbers of rows and threads: such weights are kept in each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, List, Optional, TypeAlias, Union  # noqa: UP035  # TorchScript reads these

import torch
from torch import fx
from torch.nn import functional

from ensemble_worker.backends.loaded import Call
from ensemble_worker.backends.scripting import scripted

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

# Two, so that what there is for each row differs in shape from what is the same for all.
SAMPLE_ROWS = 2
# A layer that wants the same layout for all of these wants it for any number of rows.
PROBED_ROWS = (1, 2, 3, 4, 8, 16, 1024)

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


class NotCovered(Exception):
    """The graph has nothing to gain here, or a part that cannot be kept; the message says which."""


@dataclass(slots=True)
class _Convolution:
    """What becomes one operator in place of the node `last`; `addend` is added before the activation.

    Its input is `images`, of `shape` in a sample of `sample_rows`, with zeros `around` them: left, right, top, bottom.
    """

    images: fx.Node
    shape: torch.Size
    sample_rows: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: list[int]
    around: list[int]
    dilation: list[int]
    groups: int
    last: fx.Node
    addend: fx.Node | None = None
    activation: Activation = NO_ACTIVATION
    _packed: dict[bytes, torch.Tensor] = field(default_factory=dict)

    @property
    def padding(self) -> list[int]:
        """Zeros at both sides: above and below, left and right."""
        left, right, top, bottom = self.around
        return [max(top, bottom), max(left, right)]

    def finish(self) -> None:
        """Where one side has fewer zeros around than the other, the kernel gets zeros of its own there."""
        left, right, top, bottom = self.around
        wider, higher = left - right, top - bottom
        zeros = (max(-wider, 0), max(wider, 0), max(-higher, 0), max(higher, 0))
        self.weight = functional.pad(self.weight, zeros).contiguous(memory_format=torch.channels_last)

    def packed(self, rows: int) -> torch.Tensor:
        """The weights as the kernel for so many rows wants them: the same tensor where it wants the same."""
        shape = [self.shape[0] * rows // self.sample_rows, *self.shape[1:]]
        packed = mkldnn._reorder_convolution_weight(
            self.weight, self.padding, self.stride, self.dilation, self.groups, shape
        )
        layout = mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
        return self._packed.setdefault(layout, packed)

    def changes(self) -> bool:
        """Whether it wants other weights for other numbers of rows; what it wants for some is packed."""
        return len({id(self.packed(rows)) for rows in PROBED_ROWS}) > 1


class _ByRows:
    """A module that takes the weights of `changing` after its inputs."""

    def __init__(self, module: Call, changing: Sequence[_Convolution]) -> None:
        self._module = module
        self._changing = changing
        self._weights: dict[int, list[torch.Tensor]] = {}

    def __call__(self, *inputs: torch.Tensor) -> Any:
        rows = min(len(inputs[0]), PROBED_ROWS[-1])
        weights = self._weights.get(rows)
        if weights is None:
            weights = self._weights[rows] = [one.packed(rows) for one in self._changing]
        return self._module(*inputs, *weights)


def fused(graph: fx.GraphModule, sample: Sequence[torch.Tensor], *, fixed_batch: bool) -> Call:
    """The same function as `graph`; `sample` are inputs of SAMPLE_ROWS rows, or of its fixed batch.

    Raises NotCovered.
    """
    module = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    _make_functional(module.graph)
    replaced = _replace(module, sample, fixed_batch=fixed_batch)
    if not replaced:
        raise NotCovered("it has no convolution of images with weights of its own")
    call = scripted(fx.GraphModule(module, module.graph))
    changing = [one for one, changes in replaced if changes]
    return _ByRows(call, changing) if changing else call


def _make_functional(graph: fx.Graph) -> None:
    """Replace what writes into its first argument by what does not. Raises NotCovered where somebody could tell."""
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
            raise NotCovered(f"{target} may write into what others read")
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


def _replace(
    module: fx.GraphModule, sample: Sequence[torch.Tensor], *, fixed_batch: bool
) -> list[tuple[_Convolution, bool]]:
    """Replace the convolutions of a graph: those that were, and whether it takes their weights after its inputs."""
    recorder = _Recorder(module)
    recorder.run(*sample)
    values, rows = recorder.values, len(sample[0])
    replaced: list[tuple[_Convolution, bool]] = []
    nodes = list(module.graph.nodes)
    first = next(node for node in nodes if node.op != "placeholder")
    for node in nodes:
        one = _found(module, node, values, rows) if node.target in CONVOLUTIONS else None
        if one is None:
            continue
        name, changes = f"packed_{len(replaced)}", not fixed_batch and one.changes()
        if changes:
            with module.graph.inserting_before(first):
                weight = module.graph.placeholder(name)
        else:
            weight = _held(module, name, one.packed(rows), one.last)
        bias = None if one.bias is None else _held(module, f"bias_{len(replaced)}", one.bias, one.last)
        made = _call(module.graph, one, weight, bias)
        values[made] = values[one.last]
        one.last.replace_all_uses_with(made)
        replaced.append((one, changes))
    module.graph.eliminate_dead_code()
    return replaced


def _held(module: fx.GraphModule, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    module.register_buffer(name, tensor)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _found(module: fx.GraphModule, node: fx.Node, values: Values, sample_rows: int) -> _Convolution | None:
    """A convolution with what stands around it; None if it is of another kind, or its weights are not the model's."""
    given = _arguments(node)
    images, weight, bias = given["input"], _own(module, given["weight"]), _own(module, given["bias"])
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
    one = _Convolution(images, shape, sample_rows, weight, bias, stride, around, dilation, given["groups"], node)
    if not _can_pad(around, dilation):
        return None
    _take_padding(one, values)
    _take_batch_norm(one, module)
    _take_sum(one, values)
    _take_activation(one)
    one.finish()
    return one


def _can_pad(around: Sequence[int], dilation: Sequence[int]) -> bool:
    """Zeros of the kernel's own stand next to its others, so they do for zeros around images if it is not dilated."""
    left, right, top, bottom = around
    return min(around) >= 0 and (dilation == [1, 1] or (left == right and top == bottom))


def _take_padding(one: _Convolution, values: Values) -> None:
    pad = one.images
    if pad.target not in PADS or len(pad.users) > 1:
        return
    given = _arguments(pad)
    zeros = given.get("mode", "constant") == "constant" and given["value"] in (None, 0)
    if not zeros or len(given["pad"]) != 4 or not _can_pad(given["pad"], one.dilation):
        return
    one.around = [zeros + more for zeros, more in zip(one.around, given["pad"], strict=True)]
    one.images = given["self"]
    one.shape = values[one.images][0]


def _take_batch_norm(one: _Convolution, module: fx.GraphModule) -> None:
    node = _only_user(one.last)
    if node is None or node.target not in BATCH_NORMS:
        return
    given = _arguments(node)
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, scale, shift = (_own(module, given[name]) for name in names)
    last: fx.Node | None = node
    if node.target is not aten.batch_norm.default:
        # It also gives what training saves.
        items = [item for item in node.users if item.users]
        last = items[0] if len(items) == 1 and items[0].args[1] == 0 else None
    if last is None or mean is None or variance is None or given.get("training") or given["input"] is not one.last:
        return
    if (scale is None, shift is None) != (given["weight"] is None, given["bias"] is None):
        return
    factor = torch.rsqrt(variance + given["eps"])
    factor = factor if scale is None else factor * scale
    one.weight = one.weight * factor.reshape(-1, 1, 1, 1)
    bias = (-mean if one.bias is None else one.bias - mean) * factor
    one.bias = bias if shift is None else bias + shift
    one.last = last


def _take_sum(one: _Convolution, values: Values) -> None:
    node = _only_user(one.last)
    if node is None or node.target is not aten.add.Tensor or node.kwargs:
        return
    others = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not one.last]
    after = _only_user(node)
    # The kernel that adds knows but one activation.
    if after is not None and after.target in ACTIVATIONS and after.target is not aten.relu.default:
        return
    if len(others) == 1 and values.get(others[0]) == values[one.last]:
        one.addend, one.last = others[0], node


def _take_activation(one: _Convolution) -> None:
    node = _only_user(one.last)
    if node is not None and node.target in ACTIVATIONS:
        one.activation = ACTIVATIONS[node.target](_arguments(node))
        one.last = node


def _call(graph: fx.Graph, one: _Convolution, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """The operator, where the last of what it replaces is."""
    with graph.inserting_before(one.last):
        name, numbers, algorithm = one.activation
        scalars: fx.Node | list[Any] = graph.call_function(_scalars, ([*numbers],)) if numbers else []
        layer = weight, bias, one.padding, one.stride, one.dilation, one.groups
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


def _own(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """A tensor of the model's own."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found.detach() if isinstance(found, torch.Tensor) else None
