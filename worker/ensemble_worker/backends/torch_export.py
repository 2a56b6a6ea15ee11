"""`.pt2` files of torch.export.save: inspected, loaded without their pickles, and compiled for inference."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import torch
from torch.fx.graph import CodeGen

from ensemble_worker.backends import convolutions, export_graph, forms, stacking
from ensemble_worker.backends.loaded import Form, Loaded
from ensemble_worker.backends.scripting import scripted
from ensemble_worker.errors import InvalidArchive
from ensemble_worker.inspect_export import InspectedExport, inspect_export
from ensemble_worker.signature import Signature, of_export

log = logging.getLogger(__name__)


def load(path: Path, device: torch.device) -> Loaded:
    """Load a `.pt2` file on a device.

    Raises InvalidArchive if it was refused or torch cannot read it, InvalidModel if its inputs or outputs cannot be
    served.
    """
    inspected = inspect_export(path)
    signature = of_export(inspected.program)
    try:
        graph = export_graph.read(inspected, device)
    except export_graph.NotCovered as cause:
        log.info("%s is read by torch.export.load: %s", path, cause)
        graph = _read_by_torch(inspected, device)
    layers = stacking.layers_of(graph) if device.type == "cpu" else None
    return Loaded(graph, signature, forms=_forms(graph, signature, device), layers=layers)


def _read_by_torch(inspected: InspectedExport, device: torch.device) -> torch.fx.GraphModule:
    """The same by torch.export.load, for the few programs that need all of it; it imports torch's compiler."""
    from torch.export.passes import move_to_device_pass

    try:
        with inspected.view() as view:
            exported = torch.export.load(view)  # type: ignore[arg-type]  # any readable, seekable stream will do
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch's loader raises nearly anything; the file is at fault, never the worker.
        raise InvalidArchive(f"torch {torch.__version__} cannot read it: {error or type(error).__name__}") from error
    if device.type != "cpu":
        exported = move_to_device_pass(exported, device)
    return _flat(exported.module(check_guards=False))


def _flat(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph as a plain function of tensors: no containers and no checks, half the time of small models."""
    module.graph.set_codegen(CodeGen())
    return torch.fx.GraphModule(module, module.graph)


def _forms(graph: torch.fx.GraphModule, signature: Signature, device: torch.device) -> tuple[Form, ...]:
    found = forms.compiled(lambda: _scripted(graph), device)
    if device.type == "cpu" and any(node.target in convolutions.CONVOLUTIONS for node in graph.graph.nodes):
        fuse = functools.partial(convolutions.fused, graph, fixed_batch=signature.fixed_batch is not None)
        found += (Form("fused convolutions", fuse),)
    return found


def _scripted(graph: torch.fx.GraphModule) -> torch.jit.ScriptModule:
    """A copy of the graph as TorchScript."""
    return scripted(torch.fx.GraphModule(graph, copy.deepcopy(graph.graph)))
