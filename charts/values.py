"""The chart's values from their schema: values.yaml, the chart's README.md and docs/chart-values.md. Pure."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Schema = Mapping[str, Any]
HEAD = """# Values of the chart

<!-- {by} -->
"""
README_HEAD = """# Ensemble Operator

<!-- {by} -->

Serves ensembles of deep neural networks as one model: apply an `InferenceEnsemble`, and its members answer behind one
URL.

```console
$ helm install ensembles charts/ensemble-operator --namespace ensembles --create-namespace \\
    --set images.registry=REGISTRY --wait
$ helm test ensembles --namespace ensembles
```

How the images are built, and how a release is upgraded and removed: `docs/install.md` in the repository.

## Values
"""
TABLE_HEAD = """
What `helm install --set` or a file given with `--values` may set. A key that is not listed here is refused.

| key | default | what it is |
| --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Value:
    """One key, by its path from the top; a group of further keys has no default."""

    path: tuple[str, ...]
    description: str
    default: Any
    is_group: bool


def values(schema: Schema) -> Iterator[Value]:
    """Every key of the schema in its order, a group before what it holds; keys without a description are left out."""
    yield from _below(schema["properties"], (), {}, schema["definitions"])


def _below(properties: Schema, path: tuple[str, ...], defaults: Schema, definitions: Schema) -> Iterator[Value]:
    for key, named in properties.items():
        part = _resolved(named, definitions)
        inner = part.get("properties")
        default = defaults.get(key, part.get("default"))
        here = (*path, key)
        if key == "global":
            continue
        yield Value(here, part["description"], None if inner else default, bool(inner))
        if inner:
            yield from _below(inner, here, default or {}, definitions)


def _resolved(part: Schema, definitions: Schema) -> Schema:
    """A part with what it refers to; its own keys win."""
    reference = part.get("$ref", "")
    return {**definitions[reference.rpartition("/")[2]], **part} if reference else part


def values_yaml(schema: Schema) -> str:
    """values.yaml: each key with its default, below its description."""
    lines = []
    for value in values(schema):
        indent = "  " * (len(value.path) - 1)
        if len(value.path) == 1:
            lines.append("")
        described = textwrap.wrap(value.description, 116 - len(indent))
        lines += [f"{indent}# {line}" for line in described]
        written = "" if value.is_group else f" {_flow(value.default)}"
        lines.append(f"{indent}{value.path[-1]}:{written}")
    return "\n".join(lines) + "\n"


def values_table(schema: Schema, head: str, by: str) -> str:
    """A document below `head`: a row for each key that has a default."""
    rows = []
    groups: dict[tuple[str, ...], str] = {}
    for value in values(schema):
        if value.is_group:
            groups[value.path] = value.description
            continue
        said = " ".join(filter(None, (groups.get(value.path[:-1], ""), value.description)))
        rows.append(f"| `{'.'.join(value.path)}` | `{_flow(value.default)}` | {said.replace('|', chr(92) + '|')} |")
    return head.format(by=by) + TABLE_HEAD + "\n".join(rows) + "\n"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    return json.dumps(value)
