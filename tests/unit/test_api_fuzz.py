"""Whatever is done to a good document: it is parsed, or it is an InvalidSpec with paths and one-line messages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemble_operator.api import (
    InferenceEnsemble,
    InvalidSpec,
    cluster_only,
    ensemble_digest,
    parse,
    parse_yaml,
)
from tests.unit.test_api import FULL

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=4)
    | st.sampled_from(
        ["10%", "1e99", "30s", "1Gi", "file:", "pvc:///", "http://[", "none", "\ud800", "9" * 5000, 10**400, -(10**30)]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.sampled_from([set(), frozenset(), object()])
    ),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a document."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    found = [path] if path else []
    for key, part in inner:
        found += places(part, (*path, key))
    return found


PLACES = places(FULL)


@st.composite
def mutants(draw: st.DrawFn) -> dict[str, Any]:
    document = copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 4))):
        *parents, last = draw(st.sampled_from(PLACES))
        place: Any = document
        for key in parents:
            within = isinstance(place, list) and isinstance(key, int) and key < len(place)
            place = place[key] if within or (isinstance(place, dict) and key in place) else None
        if isinstance(place, dict):
            action = draw(st.sampled_from(["replace", "remove", "rename"]))
            if action == "replace":
                place[last] = draw(VALUES)
            else:
                kept = place.pop(last, None)
                if action == "rename":
                    place[draw(st.text(max_size=12) | st.integers() | st.booleans())] = kept
        elif isinstance(place, list) and isinstance(last, int) and last < len(place):
            place[last] = draw(VALUES)
    return document


def check(ensemble: InferenceEnsemble) -> None:
    assert 1 <= ensemble.spec.combine.quorum <= len(ensemble.spec.members)
    assert len(ensemble_digest(ensemble)) == 16
    assert all(path.startswith("spec.") for path in cluster_only(ensemble))


def outcome(parser: Callable[[], InferenceEnsemble]) -> InferenceEnsemble | InvalidSpec:
    try:
        return parser()
    except InvalidSpec as error:
        return error


@settings(max_examples=600, deadline=2000)
@given(mutants())
def test_no_mutation_raises_anything_but_invalid_spec(document: dict[str, Any]) -> None:
    result = outcome(lambda: parse(document, source="x.yaml"))
    if isinstance(result, InferenceEnsemble):
        check(result)
        return
    assert result.problems
    assert all(problem.path and problem.message for problem in result.problems)
    assert all(len(line) < 1500 and line.startswith("x.yaml: ") for line in str(result).splitlines())
    str(result).encode()


@settings(max_examples=300, deadline=2000)
@given(VALUES)
def test_no_document_raises_anything_but_invalid_spec(document: object) -> None:
    result = outcome(lambda: parse(document))
    assert isinstance(result, InvalidSpec)
    assert result.problems


TEXT = yaml.safe_dump(FULL)
SNIPPETS = [
    "&a",
    "*a",
    "!!int ",
    "!!binary x",
    "!!bool ",
    "!!float ",
    "!!set {a: b}",
    "!!timestamp 2020-99-99",
    "---\n",
    "? ",
    "\t",
    "<<: 1\n",
    "? []\n: 1\n",
    "? &a {}\n",
]


@settings(max_examples=400, deadline=2000)
@given(st.integers(0, len(TEXT)), st.integers(0, 30), st.text(max_size=12) | st.sampled_from(SNIPPETS))
@example(TEXT.index("uri: ") + len("uri: "), len(TEXT), "!!int")
def test_no_text_raises_anything_but_invalid_spec(start: int, removed: int, inserted: str) -> None:
    text = TEXT[:start] + inserted + TEXT[start + removed :]
    result = outcome(lambda: parse_yaml(text, source="x.yaml"))
    if isinstance(result, InferenceEnsemble):
        check(result)
    else:
        assert result.problems
