"""Members of one architecture as one network: their layers stacked, each one call for all of them.

A small network spends most of its time on calling its operators, and the members of a deep ensemble (one architecture,
other weights) call the same ones. Covered are perceptrons: linear layers with element-wise functions between them. What
comes before the first layer and has no weights is done once for all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ensemble_worker.backends.scripting import scripted

aten = torch.ops.aten

# Where weights are larger, a layer takes far longer than its call; and stacks hold a copy of them.
MAX_BYTES = 4 << 20

OF_ONE = frozenset(
    {
        aten.relu.default, aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.selu.default,
        aten.gelu.default, aten.silu.default, aten.mish.default, aten.softplus.default, aten.hardtanh.default,
        aten.hardsigmoid.default, aten.hardswish.default, aten.sigmoid.default, aten.tanh.default, aten.sin.default,
        aten.cos.default, aten.exp.default, aten.abs.default, aten.neg.default, aten.square.default,
    }
)  # fmt: skip
OF_TWO = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
OF_CLASSES = frozenset({aten.softmax.int, aten.log_softmax.int})


class _NotStackable(Exception):
    """The graph has a part that is no perceptron's."""


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """A network that can be stacked with others of its `architecture`.

    `stacked` takes the inputs and then the stacked `held` tensors, and gives outputs of shape (members, rows, …).
    `is_weight` says which of them are a layer's weights, of shape (outputs, inputs); the others are biases.
    """

    architecture: str
    held: tuple[torch.Tensor, ...]
    is_weight: tuple[bool, ...]
    stacked: fx.Graph


class Stack:
    """Networks of one architecture, each with its place: any that stand side by side run as one."""

    def __init__(self, networks: Sequence[Layers]) -> None:
        self._call = scripted(fx.GraphModule(torch.nn.Module(), copy.deepcopy(networks[0].stacked))).forward
        stacked = [torch.stack(of_all) for of_all in zip(*(network.held for network in networks), strict=True)]
        # As (members, inputs, outputs) and (members, 1, outputs), which is how one product wants them.
        self._held = [
            tensors.transpose(1, 2) if is_weight else tensors.unsqueeze(1)
            for tensors, is_weight in zip(stacked, networks[0].is_weight, strict=True)
        ]
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}

    def run(self, inputs: Sequence[torch.Tensor], first: int, end: int) -> Sequence[torch.Tensor]:
        """Outputs, each of shape (end - first, rows, …), of the networks from `first` to before `end`."""
        held = self._views.get((first, end))
        if held is None:
            held = self._views[first, end] = [tensor[first:end] for tensor in self._held]
        outputs: Sequence[torch.Tensor] = self._call(*inputs, *held)
        return outputs


def layers_of(graph: fx.GraphModule) -> Layers | None:
    """The layers of a graph of tensors, None where it cannot be stacked, or is too large for it to be worth while."""
    try:
        return _Stacking(graph).layers()
    except _NotStackable:
        return None


class _Stacking:
    """Makes the graph of the stack, node by node; values are shared by all members until the first layer."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._module = graph
        self._nodes = list(graph.graph.nodes)
        self._made = fx.Graph()
        self._values: dict[fx.Node, fx.Node] = {}
        self._stacked: set[fx.Node] = set()
        self._roles: dict[fx.Node, bool] = {}

    def layers(self) -> Layers:
        """Raises _NotStackable."""
        for op in ("placeholder", "get_attr"):
            for node in self._nodes:
                if node.op == op:
                    self._values[node] = self._made.placeholder(f"{op}_{len(self._values)}")
        held = dict.fromkeys(node for node in self._nodes if node.op == "get_attr")
        for node in self._nodes:
            if node.op == "call_function":
                self._values[node] = self._call(node, held)
            elif node.op == "output":
                self._made.output(tuple(self._stacked_value(value) for value in node.args[0]))
        if self._roles.keys() != held.keys():
            raise _NotStackable
        tensors = tuple(self._tensor(str(node.target)) for node in held)
        if sum(tensor.nbytes for tensor in tensors) > MAX_BYTES:
            raise _NotStackable
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return Layers(
            f"{self._module.code}\n{shapes}",
            tensors,
            tuple(self._roles[node] for node in held),
            self._made,
        )

    def _tensor(self, target: str) -> torch.Tensor:
        """What a graph refers to by a path of attributes; a parameter in a graph that torch has read."""
        found: object = self._module
        for name in target.split("."):
            found = getattr(found, name)
        if not isinstance(found, torch.Tensor):
            raise _NotStackable
        return found.detach()

    def _call(self, node: fx.Node, held: dict[fx.Node, None]) -> fx.Node:
        if any(given in held for given in node.all_input_nodes):
            made = self._linear(node)
        else:
            made = self._made.node_copy(node, self._values.__getitem__)
            if node.target is aten.relu.default and self._is_layers_own(node):
                made.target = aten.relu_.default
            if not any(given in self._stacked for given in node.all_input_nodes):
                return made
            if not _is_alike_for_each_member(node):
                raise _NotStackable
        self._stacked.add(node)
        return made

    def _is_layers_own(self, node: fx.Node) -> bool:
        """Whether it alone uses the output of a layer, and may write over it."""
        (given,) = node.all_input_nodes
        return given in self._stacked and given.target is aten.linear.default and len(given.users) == 1

    def _linear(self, node: fx.Node) -> fx.Node:
        if node.target is not aten.linear.default or node.kwargs:
            raise _NotStackable
        rows, weight, bias = (*node.args, None)[:3]
        if not isinstance(rows, fx.Node) or rows in self._roles:
            raise _NotStackable
        for tensor, is_weight in ((weight, True), (bias, False)):
            if tensor is None:
                continue
            if not isinstance(tensor, fx.Node) or tensor.op != "get_attr":
                raise _NotStackable
            if self._roles.setdefault(tensor, is_weight) != is_weight:
                raise _NotStackable
        given, weights, biases = [
            self._values[one] if isinstance(one, fx.Node) else None for one in (rows, weight, bias)
        ]
        if rows not in self._stacked:
            members = self._made.call_function(aten.size.int, (weights, 0))
            given = self._made.call_function(aten.expand.default, (given, (members, -1, -1)))
        if biases is None:
            return self._made.call_function(aten.bmm.default, (given, weights))
        return self._made.call_function(aten.baddbmm.default, (biases, given, weights))

    def _stacked_value(self, node: object) -> fx.Node:
        if not isinstance(node, fx.Node) or node not in self._stacked:
            raise _NotStackable
        return self._values[node]


def _is_alike_for_each_member(node: fx.Node) -> bool:
    """Whether an operator does the same with one dimension more in front."""
    if node.target in OF_ONE or node.target in OF_TWO:
        return True
    if node.target is aten.dropout.default:
        return node.args[2:] == (False,)
    return node.target in OF_CLASSES and node.args[1:2] == (-1,)
