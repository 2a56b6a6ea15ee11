"""Who may use podTemplate, pvc:// and credentialsSecret: people ask with their own tokens, then the operator decides.

In the order in which they are written: the last one has the release serve without allowOverrides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import CHART, Cluster, Manifest, until
from tests.cluster.people import Person, person
from tests.cluster.serving import API, Ensemble, spec_of

PLAIN = {"uri": "http://models:8080/two.onnx"}
CLAIM = {"uri": "pvc://models/two.onnx"}
WITH_SECRET = {"uri": "s3://bucket/two.onnx", "credentialsSecret": "store"}
TEMPLATE = {"worker": {"env": [{"name": "NOTE", "value": "mine"}]}}
# What of a pod template reaches other objects: Secrets, claims, Services and NetworkPolicies, others' pods.
REACHING: Manifest = {
    "worker": {
        "image": "localhost/other:test",
        "env": [{"name": "NOTE", "valueFrom": {"secretKeyRef": {"name": "store", "key": "note"}}}],
        "volumes": [{"name": "theirs", "secret": {"secretName": "store"}}],
        "volumeMounts": [{"name": "theirs", "mountPath": "/theirs"}],
        "imagePullSecrets": [{"name": "store"}],
    },
    "gateway": {
        "labels": {"app": "theirs"},
        "annotations": {"example.com/inject": "yes"},
        "priorityClassName": "system-cluster-critical",
        "runtimeClassName": "theirs",
    },
}
CREATE_PODS: Manifest = {"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}
GET_SECRET: Manifest = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["store"]}
# What a refusal by the chart's policy has, and one by RBAC has not.
POLICY = "ValidatingAdmissionPolicy"
# A new policy is in force a moment after it was made, and a removed one a moment longer.
IN_FORCE_S = 60.0

pytestmark = pytest.mark.timeout(300)


def named(name: str, model: dict[str, str], **spec: Any) -> Manifest:
    """An ensemble of one member."""
    whole = {**spec_of({"two": ""}, {"two": 1.0}, 1), "gateway": {"replicas": 1}, **spec}
    whole["members"][0]["model"] = model
    return {"apiVersion": API, "kind": "InferenceEnsemble", "metadata": {"name": name}, "spec": whole}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For kubeconfigs."""
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def roles(system: str) -> tuple[str, ...]:
    """The chart's own roles: who may see and edit ensembles, and nothing else."""
    return tuple(f"{system}-ensembles-ensemble-operator-{verb}" for verb in ("view", "edit"))


@pytest.fixture(scope="module")
def editor(cluster: Cluster, namespace: str, roles: tuple[str, ...], folder: Path) -> Person:
    """May edit ensembles, and no more. The chart's policy is in force for them."""
    found = person(cluster, namespace, "editor", roles, (), folder)
    asked = named("probe", PLAIN, podTemplate=TEMPLATE)
    until(lambda: POLICY in found.create(asked, "--dry-run=server"), IN_FORCE_S, "the policy is in force")
    return found


@pytest.fixture(scope="module")
def trusted(cluster: Cluster, namespace: str, roles: tuple[str, ...], folder: Path) -> Person:
    """May create pods and get the Secret too."""
    return person(cluster, namespace, "trusted", roles, (CREATE_PODS, GET_SECRET), folder)


def accepted(cluster: Cluster, namespace: str, name: str) -> tuple[str, str, str]:
    """The status, reason and message of the condition Accepted of the ensemble as it is now."""
    ensemble = Ensemble(cluster, namespace, name)

    def said() -> tuple[str, str, str] | None:
        for condition in ensemble.status().get("conditions", ()):
            if condition["type"] == "Accepted" and condition["status"] != "Unknown":
                return condition["status"], condition["reason"], condition["message"]
        return None

    return until(said, 60, f"Accepted of {name}", ensemble.explanation)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (named("no", PLAIN, podTemplate=TEMPLATE), "spec.podTemplate needs the right to create pods"),
        (named("no", CLAIM), "a pvc:// model needs the right to create pods"),
        (named("no", WITH_SECRET), "credentialsSecret needs the right to create pods"),
    ],
    ids=("podTemplate", "pvc", "credentialsSecret"),
)
def test_who_may_not_create_pods_is_told_why(editor: Person, document: Manifest, why: str) -> None:
    refusal = editor.create(document)
    assert why in refusal
    assert POLICY in refusal


def test_who_may_not_get_the_secret_is_told_which(
    cluster: Cluster, namespace: str, editor: Person, roles: tuple[str, ...], folder: Path
) -> None:
    creator = person(cluster, namespace, "creator", roles, (CREATE_PODS,), folder)
    assert "credentialsSecret store needs the right to get that Secret" in creator.create(named("no", WITH_SECRET))
    assert creator.create(named("yes", CLAIM, podTemplate=TEMPLATE), "--dry-run=server") == ""


def test_an_editor_has_an_ensemble_without_them(cluster: Cluster, namespace: str, editor: Person) -> None:
    assert editor.create(named("plain", PLAIN)) == ""
    assert accepted(cluster, namespace, "plain")[0] == "True"


def test_who_may_create_pods_and_get_the_secret_is_let_through(
    cluster: Cluster, namespace: str, editor: Person, trusted: Person
) -> None:
    for name, document in (
        ("template", named("template", PLAIN, podTemplate=TEMPLATE)),
        ("claim", named("claim", CLAIM)),
        ("secret", named("secret", WITH_SECRET)),
    ):
        assert trusted.create(document) == ""
        assert accepted(cluster, namespace, name)[0] == "True"


def test_without_allow_overrides_the_operator_refuses_who_may_use_them(
    cluster: Cluster, system: str, namespace: str, editor: Person, trusted: Person
) -> None:
    cluster.kubectl("delete", "inferenceensembles", "--all", "-n", namespace)
    where = ("--namespace", system, "--reuse-values", "--wait", "--timeout", "120s")
    cluster.helm("upgrade", "ensembles", str(CHART), *where, "--set", "allowOverrides=false")
    everything = named("everything", WITH_SECRET, podTemplate=REACHING)
    everything["spec"]["members"].append({"name": "four", "model": CLAIM, "format": "onnx"})
    assert POLICY in editor.create(everything, "--dry-run=server")
    assert trusted.create(everything) == ""
    status, reason, message = accepted(cluster, namespace, "everything")
    assert (status, reason) == ("False", "InvalidSpec")
    parts = {f"spec.podTemplate.{role}.{part}" for role, overrides in REACHING.items() for part in overrides}
    paths = {*parts, "spec.members[0].model.credentialsSecret", "spec.members[1].model.uri"}
    assert {path for path in paths if f"{path}: " not in message} == set()
    assert "allowOverrides" in message
    assert not Ensemble(cluster, namespace, "everything").pods()
