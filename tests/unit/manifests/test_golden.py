"""The children of each case are those of its golden file, and are the same whenever they are made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ensemble_operator.manifests import children
from tests.unit.manifests.cases import GOLDEN, SPECS, inputs, text_of

RENEW = "to accept it: python -m tests.unit.manifests.cases"


@pytest.mark.parametrize("case", SPECS)
def test_children_are_as_the_golden_file_has_them(case: str) -> None:
    made = text_of(children(inputs(case)))
    assert made == (GOLDEN / f"{case}.yaml").read_text(), RENEW


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(SPECS)


@pytest.mark.parametrize("case", SPECS)
def test_nothing_is_null_and_no_object_appears_twice(case: str) -> None:
    manifests = list(yaml.safe_load_all((GOLDEN / f"{case}.yaml").read_text()))
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)
    assert None not in list(leaves(manifests))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value
