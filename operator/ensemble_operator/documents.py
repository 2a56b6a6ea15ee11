"""Results for programs, to standard output."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml


def write(form: str, document: dict[str, Any]) -> None:
    """Write a document of JSON's types as `json` or `yaml`."""
    if form == "json":
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))
    sys.stdout.flush()
