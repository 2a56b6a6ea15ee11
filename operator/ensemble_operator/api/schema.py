"""The words that the resource is declared in: each kind of value checks a document and describes itself as OpenAPI v3.

One declaration, two uses: the parser calls `check` and `build`, the generator of the CRD calls `openapi`. Here are the
scalars; `structure` has what contains others. Pure: no I/O.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from ensemble_operator import quantities
from ensemble_operator.errors import Problem

OpenApi = dict[str, object]
MAX_SHOWN_VALUE = 60


class Invalid:
    """What `check` returns for a value whose problem it has reported."""


INVALID: Final = Invalid()


@dataclass(frozen=True, slots=True)
class Given:
    """A field that the document sets, and its declaration's scope."""

    path: str
    scope: str


@dataclass(slots=True)
class Findings:
    """What checking a document collects: its problems, and the fields with a scope that it sets."""

    problems: list[Problem] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the document a check is, and where it reports to."""

    path: str
    findings: Findings

    def key(self, key: object) -> Place:
        """The place of a field of the mapping here."""
        if isinstance(key, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key):
            return Place(f"{self.path}.{key}" if self.path else key, self.findings)
        return Place(f"{self.path}[{show(key)}]", self.findings)

    def item(self, index: int) -> Place:
        """The place of an item of the list here."""
        return Place(f"{self.path}[{index}]", self.findings)

    def report(self, message: str) -> Invalid:
        """Note a problem with the value here."""
        self.findings.problems.append(Problem(self.path, message))
        return INVALID

    def must(self, expectation: str, value: object) -> Invalid:
        """Note that the value here must be something else."""
        return self.report(f"must be {expectation}, got {show(value)}")


class Kind(Protocol):
    """A kind of value."""

    def check(self, value: object, at: Place) -> object:
        """The value in checked form, defaults filled in; INVALID, the problem reported, if it is not of this kind."""
        ...

    def build(self, checked: object) -> object:
        """The typed value of a checked one without problems."""
        ...

    def openapi(self) -> OpenApi:
        """The schema, as the API server wants it in a CRD."""
        ...


def show(value: object) -> str:
    """A value as an error message quotes it: short, on one line, whatever it is."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN_VALUE:
        return "a number of more than 60 digits"
    if isinstance(value, str):
        text = repr(value[: MAX_SHOWN_VALUE + 1])
    elif isinstance(value, (int, float)):
        text = str(value)
    else:
        return f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN_VALUE + 2 else text[:MAX_SHOWN_VALUE] + "…'"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, as a part of a message; empty if none is near."""
    plain = {re.sub(r"[-_]", "", name).lower(): name for name in known}
    close = difflib.get_close_matches(re.sub(r"[-_]", "", word[:100]).lower(), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else ""


class Scalar:
    """A kind whose checked value is already the typed one."""

    __slots__ = ()

    def build(self, checked: object) -> object:
        """The checked value itself."""
        return checked


@dataclass(frozen=True, slots=True)
class Text(Scalar):
    """A string. `pattern` has no anchors and matches all of it; `expectation` says in words what it must be.

    `refuse` looks further: it returns what is wrong with a string, or nothing. Only `free` text may hold line ends.
    """

    max_length: int
    min_length: int = 0
    pattern: str = ""
    expectation: str = "a string"
    refuse: Callable[[str], str | None] | None = None
    free: bool = False

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if not isinstance(value, str):
            quote = f"; write it in quotes: '{value}'" if type(value) in (int, float) and len(show(value)) < 30 else ""
            return at.report(f"must be {self.expectation}, got {show(value)}{quote}")
        if not self.min_length <= len(value) <= self.max_length:
            length = f"{self.min_length} to {self.max_length} characters"
            return at.report(f"must be {self.expectation} of {length}, got {len(value)} characters")
        if not (self.free or value.isprintable()) or (self.pattern and not re.fullmatch(self.pattern, value)):
            return at.must(self.expectation, value)
        wrong = self.refuse(value) if self.refuse else None
        return at.report(wrong) if wrong else value

    def openapi(self) -> OpenApi:
        """See Kind."""
        schema: OpenApi = {"type": "string", "maxLength": self.max_length}
        if self.min_length:
            schema["minLength"] = self.min_length
        if self.pattern:
            schema["pattern"] = f"^({self.pattern})$"
        return schema


@dataclass(frozen=True, slots=True)
class Choice(Scalar):
    """One of a few strings."""

    values: tuple[str, ...]

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, str):
            if value in self.values:
                return value
            return at.report(f"must be one of {', '.join(self.values)}, got {show(value)}{nearest(value, self.values)}")
        return at.must(f"one of {', '.join(self.values)}", value)

    def openapi(self) -> OpenApi:
        """See Kind."""
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True, slots=True)
class Integer(Scalar):
    """A whole number within bounds, both included."""

    minimum: int
    maximum: int

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, bool) or not isinstance(value, int):
            return at.must("a whole number", value)
        if not self.minimum <= value <= self.maximum:
            return at.must(f"{self.minimum} to {self.maximum}", value)
        return value

    def openapi(self) -> OpenApi:
        """See Kind."""
        return {"type": "integer", "format": "int64", "minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True, slots=True)
class Number(Scalar):
    """A finite number: at least `minimum` (above it where `exclusive`), at most `maximum`."""

    minimum: float
    maximum: float
    exclusive: bool = False

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return at.must("a number", value)
        if isinstance(value, float) and math.isnan(value):
            return at.must("a number", value)
        if value < self.minimum or (self.exclusive and value == self.minimum):
            return at.must(f"above {self.minimum:g}" if self.exclusive else f"{self.minimum:g} or more", value)
        if value > self.maximum:
            return at.must(f"at most {self.maximum:g}", value)
        return float(value)

    def openapi(self) -> OpenApi:
        """See Kind."""
        schema: OpenApi = {"type": "number", "minimum": self.minimum, "maximum": self.maximum}
        if self.exclusive:
            schema["exclusiveMinimum"] = True
        return schema


@dataclass(frozen=True, slots=True)
class Duration(Scalar):
    """A Go duration between `shortest` and `longest` (both included, written as durations), checked into seconds."""

    shortest: str
    longest: str

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if not isinstance(value, str):
            return at.must("a duration like 30s, 1m30s or 5ms", value)
        try:
            seconds = quantities.parse_duration_s(value)
        except ValueError as error:
            return at.report(f"{error}, got {show(value)}")
        if not quantities.parse_duration_s(self.shortest) <= seconds <= quantities.parse_duration_s(self.longest):
            return at.must(f"{self.shortest} to {self.longest}", value)
        return seconds

    def openapi(self) -> OpenApi:
        """See Kind."""
        rule = f"duration(self) >= duration('{self.shortest}') && duration(self) <= duration('{self.longest}')"
        return {
            "type": "string",
            "maxLength": quantities.MAX_TEXT,
            "pattern": f"^({quantities.DURATION_PATTERN})$",
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be {self.shortest} to {self.longest}"}],
        }


@dataclass(frozen=True, slots=True)
class Quantity(Scalar):
    """A Kubernetes quantity between `least` and `most` (both included), checked by `convert` into bytes or cores."""

    convert: Callable[[str], float]
    least: str
    most: str

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if isinstance(value, float) and math.isfinite(value):
            return at.report(f"must be a quantity like 512Mi or 250m; write it in quotes: '{value}'")
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            return at.must("a quantity like 512Mi, 2G or 250m", value)
        if isinstance(value, int) and not 0 <= value <= quantities.MAX_QUANTITY:
            return at.must(f"{self.least} to {self.most}", value)
        try:
            amount = self.convert(str(value))
        except ValueError as error:
            return at.report(f"{error}, got {show(value)}")
        if not self.convert(self.least) <= amount <= self.convert(self.most):
            return at.must(f"{self.least} to {self.most}", value)
        return amount

    def openapi(self) -> OpenApi:
        """See Kind."""
        bounds = f"quantity('{self.least}')) >= 0 && quantity(string(self)).compareTo(quantity('{self.most}')) <= 0"
        rule = f"quantity(string(self)).compareTo({bounds}"
        return {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": quantities.MAX_TEXT,
            "pattern": f"^({quantities.QUANTITY_PATTERN})$",
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be {self.least} to {self.most}"}],
        }


@dataclass(frozen=True, slots=True)
class Percentage(Scalar):
    """A percentage like `10%`, checked into a fraction below `under`."""

    under: int

    def check(self, value: object, at: Place) -> object:
        """See Kind."""
        if not isinstance(value, str):
            return at.must("a percentage like 10%", value)
        try:
            fraction = quantities.parse_percentage(value)
        except ValueError as error:
            return at.report(f"{error}, got {show(value)}")
        return fraction if fraction * 100 < self.under else at.must(f"under {self.under}%", value)

    def openapi(self) -> OpenApi:
        """See Kind."""
        rule = f"double(self.replace('%', '')) < {self.under}.0"
        return {
            "type": "string",
            "maxLength": 7,
            "pattern": f"^({quantities.PERCENTAGE_PATTERN})$",
            "x-kubernetes-validations": [{"rule": rule, "message": f"must be under {self.under}%"}],
        }
