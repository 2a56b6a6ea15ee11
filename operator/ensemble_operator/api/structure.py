"""Kinds of values that contain others: groups of named fields, lists, maps, and what Kubernetes itself defines.

Checking goes on after a problem, so that a document gets all of its problems at once. It never visits more of a
document than the declaration allows, whatever aliases or cycles a YAML file has built. Pure: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ensemble_operator.api.schema import INVALID, Findings, Given, Kind, OpenApi, Place, Scalar, nearest, show


class Missing:
    """The default of a field that has none."""


REQUIRED: Final = Missing()
ABSENT: Final = Missing()

Checked = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a group.

    `default` is written as a document writes it; ABSENT gives None. `name` is the typed value's, with its unit
    (default: the key in snake case). A field with a `scope` is noted when a document sets it.
    """

    key: str
    kind: Kind
    description: str
    default: object = REQUIRED
    name: str = ""
    scope: str = ""

    def check(self, value: object, at: Place) -> object:
        """The checked value of the field in a document (None: it is not there)."""
        if value is not None:
            checked = self.kind.check(value, at)
            if self.scope and value not in ({}, []):
                at.findings.given.append(Given(at.path, self.scope))
            return checked
        if self.default is REQUIRED:
            return at.report("is required")
        return self.checked_default()

    def checked_default(self) -> object:
        """The checked form of the default; None where there is none."""
        if isinstance(self.default, Missing):
            return None
        return self.kind.check(self.default, Place(self.key, Findings()))

    def written_default(self) -> object:
        """The default as the CRD has it, or None.

        A group's is written out, for the API server checks a default by the rules before it fills in others. An empty
        one is left out: it would only fill every object with noise.
        """
        if isinstance(self.default, Missing) or (self.default in ("", [], {}) and not isinstance(self.kind, Group)):
            return None
        if isinstance(self.kind, Group):
            parts = {field.key: field.written_default() for field in self.kind.fields}
            return {key: default for key, default in parts.items() if default is not None} or None
        return self.default

    @property
    def target(self) -> str:
        """The name of the typed value."""
        return self.name or re.sub(r"(?<!^)(?=[A-Z])", "_", self.key).lower()


@dataclass(frozen=True, slots=True)
class Rule:
    """What the fields of a group must be to each other, in CEL for the API server and in Python for the parser.

    `check` is called when the fields in `needs` are there; it reports what is wrong. An empty `cel`: the API server
    cannot check it, for the types do not reach so far.
    """

    cel: str
    message: str
    needs: tuple[str, ...]
    check: Callable[[Checked, Place], None]


@dataclass(frozen=True, slots=True)
class Group:
    """A mapping with known fields, built by `into` (from the fields' target names)."""

    fields: tuple[Field, ...]
    into: Callable[..., object]
    rules: tuple[Rule, ...] = ()

    def check(self, value: object, at: Place) -> object:
        """See Kind. A field with a problem is left out of the checked mapping."""
        if not isinstance(value, Mapping):
            return at.must("a mapping", value)
        known = [field.key for field in self.fields]
        for key in value:
            if key not in known:
                hint = nearest(key, known) if isinstance(key, str) else ""
                at.key(key).report(f"unknown field{hint or '; known here: ' + ', '.join(known)}")
        checked: Checked = {}
        for field in self.fields:
            result = field.check(value.get(field.key), at.key(field.key))
            if result is not INVALID:
                checked[field.key] = result
        for rule in self.rules:
            if all(key in checked for key in rule.needs):
                rule.check(checked, at)
        return checked

    def build(self, checked: Any) -> object:
        """See Kind."""
        return self.into(
            **{
                field.target: None if checked[field.key] is None else field.kind.build(checked[field.key])
                for field in self.fields
            }
        )

    def openapi(self) -> OpenApi:
        """See Kind."""
        schema: OpenApi = {"type": "object"}
        required = [field.key for field in self.fields if field.default is REQUIRED]
        if required:
            schema["required"] = required
        schema["properties"] = {field.key: _described(field) for field in self.fields}
        rules = [{"rule": rule.cel, "message": rule.message} for rule in self.rules if rule.cel]
        if rules:
            schema["x-kubernetes-validations"] = rules
        return schema


@dataclass(frozen=True, slots=True)
class Listing:
    """A list, built into a tuple. With `keys`, its items are groups that these fields tell apart."""

    item: Kind
    max_items: int
    min_items: int = 0
    keys: tuple[str, ...] = ()

    def check(self, value: object, at: Place) -> object:
        """See Kind. An item with a problem is INVALID in the checked list."""
        if not isinstance(value, (list, tuple)):
            return at.must("a list", value)
        if not self.min_items <= len(value) <= self.max_items:
            return at.report(f"must have {self.min_items} to {self.max_items} items, got {len(value)}")
        checked = [self.item.check(item, at.item(index)) for index, item in enumerate(value)]
        self._refuse_twins(checked, at)
        return checked

    def _refuse_twins(self, checked: list[Any], at: Place) -> None:
        first: dict[object, int] = {}
        for index, item in enumerate(checked):
            if not self.keys or not isinstance(item, dict) or any(key not in item for key in self.keys):
                continue
            earlier = first.setdefault(tuple(item[key] for key in self.keys), index)
            if earlier != index:
                what = " and ".join(f"{key} {show(item[key])}" for key in self.keys)
                at.item(index).report(f"{what} is already at {at.item(earlier).path}; each must be of its own")

    def build(self, checked: Any) -> object:
        """See Kind."""
        return tuple(self.item.build(item) for item in checked)

    def openapi(self) -> OpenApi:
        """See Kind."""
        schema: OpenApi = {"type": "array", "items": self.item.openapi(), "maxItems": self.max_items}
        if self.min_items:
            schema["minItems"] = self.min_items
        if self.keys:
            schema |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(self.keys)}
        else:
            schema["x-kubernetes-list-type"] = "atomic"
        return schema


@dataclass(frozen=True, slots=True)
class OneOrMany:
    """One group, or a list of them; built into a tuple.

    A structural schema has no such type: the API server checks the fields of either form, and nothing else.
    """

    many: Listing

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, Mapping):
            return [self.many.item.check(value, at)]
        if not isinstance(value, (list, tuple)):
            return at.must("a mapping, or a list of mappings", value)
        return self.many.check(value, at)

    def build(self, checked: object) -> object:
        """See Kind."""
        return self.many.build(checked)

    def openapi(self) -> OpenApi:
        """See Kind."""
        item = self.many.item.openapi()
        either = {key: value for key, value in item.items() if key in ("required", "properties")}
        limits = {"maxItems": self.many.max_items, "minItems": self.many.min_items}
        return {"x-kubernetes-preserve-unknown-fields": True, **either, "items": item, **limits}


@dataclass(frozen=True, slots=True)
class TextOrTexts:
    """A string, or a list of strings (built into a tuple)."""

    one: Kind
    many: Listing

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, str):
            return self.one.check(value, at)
        if not isinstance(value, (list, tuple)):
            return at.must("a list of names, or the URI of a file with one on each line", value)
        return self.many.check(value, at)

    def build(self, checked: object) -> object:
        """See Kind."""
        return self.one.build(checked) if isinstance(checked, str) else self.many.build(checked)

    def openapi(self) -> OpenApi:
        """See Kind."""
        return {
            "x-kubernetes-preserve-unknown-fields": True,
            "items": self.many.item.openapi(),
            "maxItems": self.many.max_items,
        }


@dataclass(frozen=True, slots=True)
class Texts(Scalar):
    """A map of strings to strings, such as labels."""

    key: Kind
    value: Kind
    max_items: int = 64

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if not isinstance(value, Mapping):
            return at.must("a mapping of strings to strings", value)
        if len(value) > self.max_items:
            return at.report(f"must have at most {self.max_items} entries, got {len(value)}")
        checked = {
            key: self.value.check(text, at.key(key))
            for key, text in value.items()
            if self.key.check(key, at.key(key)) is key
        }
        return checked if len(checked) == len(value) and INVALID not in checked.values() else INVALID

    def openapi(self) -> OpenApi:
        """See Kind."""
        return {"type": "object", "additionalProperties": self.value.openapi(), "maxProperties": self.max_items}


@dataclass(frozen=True, slots=True)
class Kubernetes(Scalar):
    """An object that Kubernetes itself defines and checks: here only that it is JSON and has what is `required`."""

    required: tuple[str, ...] = ()
    max_values: int = 2_000
    max_depth: int = 24

    def check(self, value: object, at: Place) -> object:
        """See Kind. The checked value is a copy."""
        if not isinstance(value, Mapping):
            return at.must("a mapping", value)
        before = len(at.findings.problems)
        for key in self.required:
            if not isinstance(value.get(key), str) or not value[key]:
                at.key(key).must("a string", value.get(key))
        budget = [self.max_values]
        copy = _json_copy(value, at, budget, self.max_depth)
        return copy if len(at.findings.problems) == before else INVALID

    def openapi(self) -> OpenApi:
        """See Kind."""
        schema: OpenApi = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        if self.required:
            schema["required"] = list(self.required)
            schema["properties"] = {key: {"type": "string", "minLength": 1, "maxLength": 253} for key in self.required}
        return schema


def _json_copy(value: object, at: Place, budget: list[int], depth: int) -> object:
    """A deep copy of JSON; `budget` holds how many values may be visited, for aliases can make small YAML huge."""
    budget[0] -= 1
    if budget[0] <= 0 or depth <= 0:
        return at.report("is too large or too deep") if budget[0] == 0 or depth == 0 else INVALID
    if isinstance(value, Mapping):
        if any(not isinstance(key, str) for key in value):
            return at.must("a mapping with strings as keys", value)
        return {key: _json_copy(item, at.key(key), budget, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_copy(item, at.item(index), budget, depth - 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and value - value == 0):
        return value
    return at.must("JSON", value)


def _described(field: Field) -> OpenApi:
    schema: OpenApi = {"description": field.description, **field.kind.openapi()}
    default = field.written_default()
    if default is not None:
        schema["default"] = default
    return schema
