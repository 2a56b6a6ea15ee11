"""What runs models here: another version of it is another program, and makes profiles worthless."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress

LIBRARIES = ("torch", "onnxruntime")
# Counts the ways in which this project has executed models: what was measured of a former one says nothing of this one.
EXECUTION = 2


def library_versions() -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def execution_versions() -> dict[str, str]:
    """The same with our own part in it: what belongs into the key of a measurement."""
    return {**library_versions(), "execution": str(EXECUTION)}


def libraries_text() -> str:
    """The libraries in one line: `torch 2.13.0, onnxruntime 1.23.2`."""
    return ", ".join(f"{library} {version}" for library, version in library_versions().items())
