"""Results for programs, to standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import yaml

STDOUT, STDERR = 1, 2


def write(form: str, document: dict[str, Any]) -> None:
    """Write a document of JSON's types as `json` or `yaml`."""
    if form == "json":
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))
    sys.stdout.flush()


@contextlib.contextmanager
def standard_output_kept(form: str) -> Iterator[None]:
    """For a program's `form`, what is printed meanwhile goes to standard error: the solver has lines of its own.

    They come from native code, past `sys.stdout`.
    """
    if form == "table":
        yield
        return
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, STDOUT)
        os.close(kept)
