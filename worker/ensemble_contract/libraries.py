"""What runs models here: the libraries of which another version is another program, and makes profiles worthless."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress

LIBRARIES = ("torch", "onnxruntime")


def library_versions() -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for library in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found


def libraries_text() -> str:
    """The same in one line: `torch 2.13.0, onnxruntime 1.23.2`."""
    return ", ".join(f"{library} {version}" for library, version in library_versions().items())
