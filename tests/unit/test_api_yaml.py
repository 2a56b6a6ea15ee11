"""YAML text: its own errors have a line and a column, and its scalars mean what they mean to Kubernetes."""

from __future__ import annotations

import time

import pytest
import yaml

from ensemble_operator.api import InvalidSpec, parse, parse_yaml
from tests.unit.test_api import FULL, MINIMAL

HEAD = "apiVersion: ensemble-operator.io/v1alpha1\nkind: InferenceEnsemble\nmetadata: {name: a}\n"
MEMBER = "spec:\n  members: [{name: a, model: {uri: 'file:///a.pt2'}}]\n"


@pytest.mark.parametrize("document", [MINIMAL, FULL])
def test_text_and_document_are_the_same(document: dict[str, object]) -> None:
    assert parse_yaml(yaml.safe_dump(document), source="f") == parse(document)


def test_numbers_as_kubernetes_reads_them() -> None:
    text = HEAD + MEMBER + "  planning: {targetThroughput: 1e3, seed: 0x10}\n"
    planning = parse_yaml(text, source="f").spec.planning
    assert (planning.target_throughput, planning.seed) == (1000.0, 16)


def test_markers_and_comments_around_the_document_are_no_documents() -> None:
    assert parse_yaml(f"# mine\n---\n{HEAD}{MEMBER}---\n# the end\n", source="f").name == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: is empty: it must hold one InferenceEnsemble"),
        ("# nothing\n---\n", "f: is empty: it must hold one InferenceEnsemble"),
        ("a: 1\n---\nb: 2\n", "f: must hold one InferenceEnsemble, got 2 documents: give each a file of its own"),
        ("- 1", "f: must be an InferenceEnsemble: a mapping with apiVersion, kind, metadata and spec, got a list"),
        ("a:\n  - b: [\n", "f: line 3, column 1: not YAML: expected the node content, but found '<stream end>'"),
        ("a: b: c", "f: line 1, column 5: not YAML: mapping values are not allowed here"),
        ("a:\n\tb: 1", "f: line 2, column 1: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: 2\na: 3", "f: line 3, column 1: not YAML: the key 'a' is there twice"),
        ("a: 1\n\x01", "f: line 2: not YAML: special characters are not allowed"),
        (
            "a: !!python/object:os.system {}",
            (
                "f: line 1, column 4: not YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system'"
            ),
        ),
        ("a: 1\nb: !!int", "f: line 2, column 4: not YAML: '' is no int"),
        ("a: !!bool maybe", "f: line 1, column 4: not YAML: 'maybe' is no bool"),
        ("a: !!int x", "f: line 1, column 4: not YAML: 'x' is no int"),
        ("a: *b", "f: line 1, column 4: not YAML: found undefined alias 'b'"),
        ("[" * 5000, "f: not YAML: too deep"),
        ("x" * 1_500_001, "f: must have at most 1500000 characters, got 1500001"),
        (HEAD + "spec: {members: 2020-99-99}", "f: spec.members: must be a list, got '2020-99-99'"),
        (
            HEAD + MEMBER + "  batching: {maxDelay: 1:30}",
            "f: spec.batching.maxDelay: must be a duration like 30s, 1m30s or 5ms, got '1:30'",
        ),
        (HEAD + MEMBER + "  rollout: off", "f: spec.rollout: must be one of Online, Pause, got false"),
        (HEAD + MEMBER + "  rollout: .nan", "f: spec.rollout: must be one of Online, Pause, got nan"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_yaml(text, source="f")
    assert str(caught.value) == message


def test_a_number_of_many_digits() -> None:
    with pytest.raises(InvalidSpec):
        parse_yaml(HEAD + MEMBER + f"  rollout: {'9' * 6000}", source="f")


def test_text_that_grows_by_aliases_is_refused_quickly() -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    affinity = "  podTemplate: {worker: {affinity: {grown: *a11}}}\n"
    started = time.monotonic()
    with pytest.raises(InvalidSpec) as caught:
        parse_yaml("\n".join(lines) + "\n" + HEAD + MEMBER + affinity, source="f")
    assert time.monotonic() - started < 5
    assert any("too large or too deep" in problem.message for problem in caught.value.problems)
