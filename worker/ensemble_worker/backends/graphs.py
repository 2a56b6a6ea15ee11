"""What the rewriters of fx graphs share."""

from __future__ import annotations

import operator

import torch
from torch import fx


def held_tensor(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor of the module's own that a node stands for; a parameter in a graph that torch has read."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found = operator.attrgetter(str(node.target))(module)
    return found.detach() if isinstance(found, torch.Tensor) else None
