"""From a document, as YAML or the API server gives it, to an InferenceEnsemble, or all that is wrong with it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ensemble_operator.api.declaration import SPEC
from ensemble_operator.api.ensemble import InferenceEnsemble, Spec
from ensemble_operator.api.pods import ANNOTATIONS, CLUSTER, LABELS
from ensemble_operator.api.rules import MEMBER_NAME
from ensemble_operator.api.schema import INVALID, Findings, Given, Place, Text, nearest, show
from ensemble_operator.api.structure import REQUIRED, Field
from ensemble_operator.errors import InvalidSpec, Problem

GROUP = "ensemble-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceEnsemble"

# The names of a StatefulSet's pods and of its revisions are made of it, and must stay within 63 characters.
NAME = Text(
    40,
    1,
    r"[a-z]([-a-z0-9]*[a-z0-9])?",
    "a DNS-1123 label that starts with a letter (lower-case letters, digits and -)",
)

_TOP = ("apiVersion", "kind", "metadata", "spec", "status")
_METADATA = (
    Field("name", NAME, "Name of the ensemble."),
    Field("namespace", MEMBER_NAME, "Namespace.", "default"),
    Field("labels", LABELS, "Labels.", {}),
    Field("annotations", ANNOTATIONS, "Annotations.", {}),
)


def parse(document: object, *, source: str = "") -> InferenceEnsemble:
    """The InferenceEnsemble that a document describes. `status` and further metadata are not looked at.

    Raises InvalidSpec with every problem of the document; `source` says in its text which document that is.
    """
    if not isinstance(document, Mapping):
        expected = "must be an InferenceEnsemble: a mapping with apiVersion, kind, metadata and spec"
        raise InvalidSpec([Problem("", f"{expected}, got {show(document)}")], source)
    findings = Findings()
    top = Place("", findings)
    _check_ours(document, top)
    if findings.problems and document.get("kind") != KIND:
        raise InvalidSpec(findings.problems, source)
    for key in document:
        if key not in _TOP:
            hint = nearest(key, _TOP) if isinstance(key, str) else ""
            top.key(key).report(f"unknown field{hint or '; known here: ' + ', '.join(_TOP)}")
    metadata = _check_metadata(document.get("metadata"), top.key("metadata"))
    spec = Field("spec", SPEC, "", REQUIRED).check(document.get("spec"), top.key("spec"))
    if findings.problems:
        raise InvalidSpec(findings.problems, source)
    built = SPEC.build(spec)
    assert isinstance(built, Spec)  # noqa: S101  what `make_spec` returns, which the types of kinds do not say
    return InferenceEnsemble(
        name=metadata["name"],
        namespace=metadata["namespace"],
        spec=built,
        labels=metadata["labels"],
        annotations=metadata["annotations"],
        given=tuple(findings.given),
    )


def cluster_only(ensemble: InferenceEnsemble) -> list[str]:
    """Paths of the fields that the document sets and that only describe a cluster: one machine sets them aside."""
    return _outermost(given for given in ensemble.given if given.scope == CLUSTER)


def _outermost(given: Iterable[Given]) -> list[str]:
    paths = sorted({entry.path for entry in given})
    return [path for path in paths if not any(path.startswith((f"{other}.", f"{other}[")) for other in paths)]


def _check_ours(document: Mapping[object, object], top: Place) -> None:
    for key, ours in (("apiVersion", API_VERSION), ("kind", KIND)):
        value = document.get(key)
        if value is None:
            top.key(key).report(f"is required; it must be {ours!r}")
        elif value != ours:
            top.key(key).must(repr(ours), value)


def _check_metadata(metadata: object, at: Place) -> dict[str, Any]:
    if not isinstance(metadata, Mapping | None):
        at.must("a mapping", metadata)
        return {}
    metadata = metadata or {}
    checked = {field.key: field.check(metadata.get(field.key), at.key(field.key)) for field in _METADATA}
    return {key: value for key, value in checked.items() if value is not INVALID}
