"""How problems are told: all of them at once, each on a line, and never more of a document than makes sense."""

from __future__ import annotations

import pytest

from ensemble_operator.api import InvalidSpec, parse
from tests.unit.test_api_bad import changed


def test_all_problems_come_at_once() -> None:
    document = changed(
        ("spec.members.0.weight", -1),
        ("spec.members.1.name", "a"),
        ("spec.combine.quorum", 9),
        ("spec.output.datatype", "STRING"),
        ("spec.batching.sizes", [2, 1]),
        ("metadata.name", ""),
    )
    with pytest.raises(InvalidSpec) as caught:
        parse(document, source="my.yaml")
    assert [problem.path for problem in caught.value.problems] == [
        "metadata.name",
        "spec.members[0].weight",
        "spec.members[1]",
        "spec.output.datatype",
        "spec.batching.sizes[1]",
        "spec.combine.quorum",
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[1] == "my.yaml: spec.members[0].weight: must be above 0, got -1"


def test_what_is_not_ours_is_said_and_not_looked_into() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "Bad Name"}, "spec": {"containers": []}})
    assert str(caught.value) == (
        "apiVersion: must be 'ensemble-operator.io/v1alpha1', got 'v1'\nkind: must be 'InferenceEnsemble', got 'Pod'"
    )


@pytest.mark.parametrize("document", [None, [], "text", 5, True, b"bytes"])
def test_what_is_not_a_mapping(document: object) -> None:
    with pytest.raises(
        InvalidSpec, match="must be an InferenceEnsemble: a mapping with apiVersion, kind, metadata and spec, got"
    ):
        parse(document)


def test_a_flood_of_problems_is_cut_short() -> None:
    labels = [5] * 200
    with pytest.raises(InvalidSpec) as caught:
        parse(changed(("spec.output.labels", labels)))
    assert len(caught.value.problems) == 201
    assert str(caught.value).splitlines()[-1] == "and 151 more"


def test_a_document_that_contains_itself() -> None:
    affinity: dict[str, object] = {}
    affinity["self"] = affinity
    affinity["many"] = [affinity] * 10
    with pytest.raises(InvalidSpec, match="too large or too deep"):
        parse(changed(("spec.podTemplate.worker.affinity", affinity)))
