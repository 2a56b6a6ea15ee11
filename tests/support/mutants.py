"""Random changes to resources, with a feeling for their structure: fields go, come, move, and take values of others."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

Path = tuple[str | int, ...]

STRINGS = (
    "",
    "*",
    "a",
    "0",
    "1",
    "-1",
    "1e9",
    "0s",
    "1ns",
    "1h",
    "1Gi",
    "99%",
    "100%",
    "none",
    "cpu",
    "example.com/x",
    "b.pt2",
    "file:///",
    "file:///no/such.pt2",
    "pvc://claim/x.pt2",
    "s3://bucket/x.onnx",
    "https://host.invalid/x.pt",
    "é" * 30,
    "x" * 63,
    "x" * 300,
)
NUMBERS = (-1, 0, 1, 2, 3, 8, 63, 65, 1_000_000, 2**31, 2**53, 0.1, 0.5, 1e-9, 1e12)
STRUCTURES: tuple[Any, ...] = ({}, [], None, True, {"a": {"b": [1]}}, [{"name": "x"}], {"requests": {"cpu": "x"}})


def mutant(rng: random.Random, base: dict[str, Any], roots: Sequence[str] = ()) -> dict[str, Any]:
    """`base` with one to three changes, below the named fields of its spec if there are any."""
    document = copy.deepcopy(base)
    for _ in range(rng.randint(1, 3)):
        inside = [path for path in places(document["spec"]) if not roots or path[0] in roots]
        _change(rng, document["spec"], rng.choice(inside), inside)
    return document


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of everything inside a value."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def put(value: Any, path: Path, new: object) -> None:
    """Set what is at a path."""
    _at(value, path[:-1])[path[-1]] = new


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _change(rng: random.Random, spec: Any, path: Path, others: Sequence[Path]) -> None:
    holder: Any = _at(spec, path[:-1])
    last: Any = path[-1]
    action = rng.choice(("value", "value", "value", "other", "remove", "repeat", "unknown"))
    if action == "value":
        holder[last] = _value_for(rng, holder[last])
    elif action == "other":
        holder[last] = copy.deepcopy(_at(spec, rng.choice(others)))
    elif action == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
        if action == "repeat" and isinstance(holder[-1], dict) and "name" in holder[-1]:
            holder[-1]["name"] = f"n{rng.randint(0, 9)}"
    else:
        holder["unknown" if action == "unknown" else str(last).lower()] = copy.deepcopy(holder[last])


def _value_for(rng: random.Random, old: Any) -> Any:
    """Mostly of the same type, so that a schema may let it through."""
    if rng.random() < 0.15:
        return copy.deepcopy(rng.choice(STRUCTURES))
    if isinstance(old, str):
        return rng.choice(STRINGS)
    if isinstance(old, (int, float)):
        return rng.choice(NUMBERS)
    if isinstance(old, list) and old:
        return copy.deepcopy(rng.sample(old, rng.randint(0, len(old))))
    return copy.deepcopy(rng.choice(STRUCTURES))
