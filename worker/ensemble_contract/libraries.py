"""What runs models here: another version of it is another program, and makes profiles worthless."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress

LIBRARIES = ("torch", "onnxruntime")
# Counts the ways in which workers have executed models: what was measured of a former one says nothing of this one.
EXECUTION = 2


def execution_versions() -> dict[str, str]:
    """The versions of those that are installed, and of our own part."""
    found = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return {**found, "execution": str(EXECUTION)}


def libraries_text() -> str:
    """The same in one line: `torch 2.13.0, onnxruntime 1.23.2, execution 2`."""
    return ", ".join(f"{name} {version}" for name, version in execution_versions().items())
