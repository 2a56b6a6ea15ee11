"""A graph as TorchScript: one call of C++ instead of one of Python for each operator."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import fx


def scripted(module: fx.GraphModule) -> torch.jit.ScriptModule:
    """A module of ATen operators as TorchScript, which keeps symbolic sizes (tracing would freeze them).

    They share their weights; the module's graph is changed.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            _use_scriptable_target(node)
    module.recompile()
    with warnings.catch_warnings():
        # It looks at torch.nn.Module's own annotations too.
        warnings.simplefilter("ignore")
        return _of_its_own(torch.jit.script(module).eval())


def _use_scriptable_target(node: fx.Node) -> None:
    """TorchScript resolves overloads itself and knows a few of torch.export's own operators by other names."""
    target: Any = node.target
    if target is torch.ops.aten.sym_size.int:
        node.target = torch.ops.aten.size
    elif target is torch.ops.aten._assert_tensor_metadata.default:
        node.graph.erase_node(node)
    else:
        node.target = target.overloadpacket


def _of_its_own(made: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The same module, read back from its code without its weights, which both share.

    Whatever torch.jit.script makes in a process belongs to one compilation unit that lives as long as the process, and
    with it the weights that freezing folds into the code; what is read back has a unit of its own.
    """
    weights = {
        (path, name): tensor
        for path, module in made.named_modules()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    }
    code = io.BytesIO()
    originals = dict(made.named_modules())
    for (path, name), tensor in weights.items():
        originals[path]._c.setattr(name, torch.empty(0, dtype=tensor.dtype))
    torch.jit.save(made, code)
    code.seek(0)
    read: torch.jit.ScriptModule = torch.jit.load(code)  # type: ignore[no-untyped-call]
    modules = dict(read.named_modules())
    for (path, name), tensor in weights.items():
        modules[path]._c.setattr(name, tensor.detach())
    return read.eval()
