"""Which form of a model was the fastest when it was measured: kept on disk, so that workers need not try the others.

Only a hint: whoever follows it still compares the form with the model as saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ensemble_contract.libraries import execution_versions
from ensemble_contract.plan import ModelSource
from ensemble_worker.devices import Device

MAX_NAME_BYTES = 64


@dataclass(frozen=True, slots=True)
class ChosenForms:
    """Names of forms in the folder `forms` of a cache, a small file for each model, execution and kind of device."""

    cache_dir: Path

    def recall(self, source: ModelSource, device: Device) -> str:
        """The form that won, empty where nobody has measured."""
        with contextlib.suppress(OSError, UnicodeDecodeError), self._path(source, device).open("rb") as file:
            return file.read(MAX_NAME_BYTES).decode()
        return ""

    def keep(self, source: ModelSource, device: Device, form: str) -> None:
        """Remember a form. A cache that cannot be written costs the next start a moment, and nothing else."""
        path = self._path(source, device)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(form)
            partial.replace(path)

    def _path(self, source: ModelSource, device: Device) -> Path:
        parts = (
            source.digest,
            execution_versions(),
            device.device_class,
            device.threads or len(device.cores),
        )
        return self.cache_dir / "forms" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
