"""Members of one architecture as one network: their layers stacked, each one call for all of them.

A small network spends most of its time on calling its operators, and the members of a deep ensemble (one architecture,
other weights) call the same ones. Covered are perceptrons: linear layers with element-wise functions between them. What
comes before the first layer and has no weights is done once for all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from ensemble_worker.backends.graphs import held_tensor
from ensemble_worker.backends.scripting import scripted

aten = torch.ops.aten

# Where weights are larger, a layer takes far longer than its call; and stacks hold a copy of them.
MAX_BYTES = 4 << 20
# A layer of fewer outputs is computed as weights times rows, not rows times weights: the other way, the rows of the
# product would be shorter than what kernels for matrix products compute at once.
NARROW = 16

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


class Role(Enum):
    """What a tensor of a network is: weights are of shape (outputs, inputs), biases of shape (outputs)."""

    WEIGHT = "weight"
    BIAS = "bias"
    NARROW_WEIGHT = "narrow weight"
    NARROW_BIAS = "narrow bias"

    def laid_out(self, stacked: torch.Tensor) -> torch.Tensor:
        """Those of all members, one after the other, as the product of their layer wants them.

        Weights are turned in memory: a product of few rows that turns them on its way takes up to half as long again.
        """
        match self:
            case Role.WEIGHT:
                return stacked.transpose(1, 2).contiguous()
            case Role.BIAS:
                return stacked.unsqueeze(1)
            case Role.NARROW_WEIGHT:
                return stacked
            case Role.NARROW_BIAS:
                return stacked.unsqueeze(2)


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """A network that can be stacked with others of its `architecture`.

    `stacked` takes the inputs and then the stacked `held` tensors, laid out by their `roles`, and gives outputs of
    shape (members, rows, …).
    """

    architecture: str
    held: tuple[torch.Tensor, ...]
    roles: tuple[Role, ...]
    stacked: fx.Graph


class Stack:
    """Networks of one architecture, each with its place: any that stand side by side run as one."""

    def __init__(self, networks: Sequence[Layers]) -> None:
        self._call = scripted(fx.GraphModule(torch.nn.Module(), copy.deepcopy(networks[0].stacked))).forward
        of_all = zip(*(network.held for network in networks), strict=True)
        self._held = [
            role.laid_out(torch.stack(tensors)) for role, tensors in zip(networks[0].roles, of_all, strict=True)
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
        self._roles: dict[fx.Node, Role] = {}

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
        tensors = tuple(self._tensor(node) for node in held)
        if sum(tensor.nbytes for tensor in tensors) > MAX_BYTES:
            raise _NotStackable
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return Layers(
            f"{self._module.code}\n{shapes}",
            tensors,
            tuple(self._roles[node] for node in held),
            self._made,
        )

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        """A tensor of the network's own. Raises _NotStackable if the node stands for none."""
        found = held_tensor(self._module, node)
        if found is None:
            raise _NotStackable
        return found

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
        if not (isinstance(rows, fx.Node) and isinstance(weight, fx.Node)) or rows in self._roles:
            raise _NotStackable
        narrow = weight.op == "get_attr" and len(self._tensor(weight)) < NARROW
        self._give(weight, Role.NARROW_WEIGHT if narrow else Role.WEIGHT, 2)
        if bias is not None:
            self._give(bias, Role.NARROW_BIAS if narrow else Role.BIAS, 1)
        given, weights, biases = [
            self._values[one] if isinstance(one, fx.Node) else None for one in (rows, weight, bias)
        ]
        if rows not in self._stacked:
            members = self._made.call_function(aten.size.int, (weights, 0))
            given = self._made.call_function(aten.expand.default, (given, (members, -1, -1)))
        if not narrow:
            return self._product(biases, given, weights)
        turned = self._made.call_function(aten.transpose.int, (given, 1, 2))
        return self._made.call_function(aten.transpose.int, (self._product(biases, weights, turned), 1, 2))

    def _product(self, biases: fx.Node | None, one: fx.Node | None, other: fx.Node | None) -> fx.Node:
        if biases is None:
            return self._made.call_function(aten.bmm.default, (one, other))
        return self._made.call_function(aten.baddbmm.default, (biases, one, other))

    def _give(self, node: object, role: Role, dimensions: int) -> None:
        """Raises _NotStackable for what is no such tensor of the network's own, or has another role already."""
        if not isinstance(node, fx.Node) or node.op != "get_attr" or self._roles.setdefault(node, role) is not role:
            raise _NotStackable
        if self._tensor(node).dim() != dimensions:
            raise _NotStackable

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
