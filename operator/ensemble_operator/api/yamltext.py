"""From YAML text to one InferenceEnsemble. The only file of the package that imports PyYAML."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from ensemble_operator.api.ensemble import InferenceEnsemble
from ensemble_operator.api.parsing import parse
from ensemble_operator.errors import InvalidSpec, Problem

MAX_CHARACTERS = 1_500_000
"""What the API server stores at most: a larger file could never be applied."""
MAX_SHOWN = 40

_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")
_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", list("tTfFyYnNoO")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What a plain scalar may be, by its first character, as PyYAML keeps it."""
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, firsts in _PLAIN_SCALARS:
        for first in firsts:
            found.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})\\Z")))
    return found


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose errors all have a place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node.

        Raises ConstructorError for a scalar that its tag contradicts, for which PyYAML raises what it happens to meet:
        KeyError for `!!bool maybe`, ValueError for `!!int x`, IndexError for an empty `!!int`.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            problem = f"{node.value[:MAX_SHOWN]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _Loader(Loader):
    """YAML as Kubernetes reads it: JSON's types, no numbers to base 60, 1e3 a number, no key twice in a mapping."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in _TYPES))
    }
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node.

        Raises ConstructorError for a key that is there twice.
        """
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, *, source: str) -> InferenceEnsemble:
    """The one InferenceEnsemble that `text` holds; `source` is the file's name, for messages.

    Raises InvalidSpec for text that is not YAML (with line and column), for none and for several documents, and as
    `parse` does.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidSpec([Problem("", f"must have at most {MAX_CHARACTERS} characters, got {len(text)}")], source)
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InvalidSpec([Problem(where, f"not YAML: {error.problem or error.context}")], source) from error
    except yaml.reader.ReaderError as error:
        where = f"line {text.count(chr(10), 0, error.position) + 1}"
        raise InvalidSpec([Problem(where, f"not YAML: {error.reason}")], source) from error
    except (yaml.YAMLError, RecursionError) as error:
        detail = "too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidSpec([Problem("", f"not YAML: {detail}")], source) from error
    if not documents:
        raise InvalidSpec([Problem("", "is empty: it must hold one InferenceEnsemble")], source)
    if len(documents) > 1:
        message = f"must hold one InferenceEnsemble, got {len(documents)} documents: give each a file of its own"
        raise InvalidSpec([Problem("", message)], source)
    return parse(documents[0], source=source)
