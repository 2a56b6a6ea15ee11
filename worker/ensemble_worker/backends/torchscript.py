"""TorchScript files of torch.jit.save: inspected, loaded by torch's restricted reader, frozen and fused."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from ensemble_worker.backends import forms
from ensemble_worker.backends.loaded import Loaded
from ensemble_worker.errors import InvalidArchive
from ensemble_worker.inspect_torchscript import inspect_torchscript
from ensemble_worker.signature import Signature


def load(path: Path, device: torch.device) -> Loaded:
    """Load a TorchScript file on a device.

    Raises InvalidArchive if it was refused or torch cannot read it.
    """
    with inspect_torchscript(path) as view:
        module = _read(view.readall(), device)
    return Loaded(module, Signature(), forms=forms.compiled(lambda: module, device))


def _read(text: bytes, device: torch.device) -> torch.jit.ScriptModule:
    try:
        module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
            io.BytesIO(text), map_location=device
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidArchive(f"torch {torch.__version__} cannot read it: {reason[:300]}") from error
    return module.eval()
