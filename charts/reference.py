"""docs/reference.md from the CRD: every field of the resource, with its type, its default and its bounds. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
HEAD = """# The resource InferenceEnsemble

<!-- {by} -->

`ensemble-operator.io/v1alpha1`, namespaced, short name `ie`. The same in a cluster:

```console
$ kubectl explain ie.spec --recursive
```

A field ending in `[]` is one item of a list; *required* means required where its parent is there.
"""
TABLE = "\n| field | type | default | what it is |\n| --- | --- | --- | --- |\n"


def reference(definition: Schema, by: str) -> str:
    """The document."""
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    text = HEAD.format(by=by)
    for part, title in (("spec", "What is wanted: `spec`"), ("status", "What is the case: `status`")):
        text += f"\n## {title}\n{TABLE}"
        text += "".join(_row(*field) for field in _fields(schema[part], part))
        if part == "spec":
            rules = list(_rules(schema[part], part))
            text += "\n## What must hold between fields\n\n" + "".join(f"- `{path}`: {said}.\n" for path, said in rules)
    return text


def _fields(schema: Schema, path: str) -> Iterator[tuple[str, Schema, bool]]:
    for key, part in schema.get("properties", {}).items():
        here = f"{path}.{key}"
        yield here, part, key in schema.get("required", ())
        if "properties" in part:
            yield from _fields(part, here)
        elif part.get("type") == "array" or "x-kubernetes-preserve-unknown-fields" in part:
            yield from _fields(part.get("items", {}), f"{here}[]")


def _rules(schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield path, rule["message"]
    for key, part in schema.get("properties", {}).items():
        yield from _rules(part, f"{path}.{key}")
        if "items" in part:
            yield from _rules(part["items"], f"{path}.{key}[]")


def _row(path: str, part: Schema, required: bool) -> str:
    default = part.get("default")
    written = "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"
    described = part.get("description", "") + (" *Required.*" if required else "")
    return f"| `{path}` | {_cell(_type(part))} | {_cell(written)} | {_cell(described.strip())} |\n"


def _type(part: Schema) -> str:
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    if part.get("x-kubernetes-int-or-string"):
        return "quantity"
    if part.get("type") == "array":
        return f"list of {_type(part['items'])}"
    if "additionalProperties" in part:
        return "map of strings"
    name = str(part.get("type", "one or a list" if "items" in part else "any"))
    low, high = part.get("minimum"), part.get("maximum")
    return f"{name}, {low} to {high}" if low is not None and high is not None and high < 1e9 else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
