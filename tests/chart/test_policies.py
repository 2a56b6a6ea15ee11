"""Who may use podTemplate, pvc:// and credentialsSecret, on a real API server with users of different rights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.chart.helm import CHART, Helm, tool
from tests.support.control_plane import ControlPlane, Refused
from tests.support.kubeconfigs import token_of

ENSEMBLES = "/apis/ensemble-operator.io/v1alpha1/namespaces/{}/inferenceensembles"
MERGE = "application/merge-patch+json"
IN_FORCE_S = 30
EDIT = {"apiGroups": ["ensemble-operator.io"], "resources": ["inferenceensembles", "inferenceensembles/scale"],
        "verbs": ["*"]}  # fmt: skip
CREATE_PODS = {"apiGroups": [""], "resources": ["pods"], "verbs": ["create"]}


def get_secret(*names: str) -> dict[str, list[str]]:
    return {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"], "resourceNames": list(names)}


EDITOR = ("editor", [EDIT])
CREATOR = ("creator", [EDIT, CREATE_PODS])
TRUSTED = ("trusted", [EDIT, CREATE_PODS, get_secret("s3", "gcs")])
READER = ("reader", [EDIT, get_secret("s3", "gcs")])


def ensemble(*models: dict[str, str], **spec: Any) -> dict[str, Any]:
    members = [{"name": f"m{index}", "model": model} for index, model in enumerate(models or (PLAIN,))]
    return {
        "apiVersion": "ensemble-operator.io/v1alpha1",
        "kind": "InferenceEnsemble",
        "metadata": {"generateName": "e-"},
        "spec": {"members": members, "devices": {"count": 1}, "input": TENSOR, "output": TENSOR, **spec},
    }


TENSOR = {"name": "x", "datatype": "FP32", "shape": [4]}
PLAIN = {"uri": "http://models/a.onnx"}
CLAIM = {"uri": "pvc://models/a.onnx"}
WITH_S3 = {"uri": "s3://bucket/a.onnx", "credentialsSecret": "s3"}
WITH_GCS = {"uri": "gs://bucket/a.onnx", "credentialsSecret": "gcs"}
WITH_OTHER = {"uri": "s3://bucket/b.onnx", "credentialsSecret": "other"}
RUNTIME = {"podTemplate": {"worker": {"runtimeClassName": "nvidia"}}}
IMAGE = {"podTemplate": {"gateway": {"image": "example.com/mine"}}}


@pytest.fixture(scope="module")
def served(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A namespace that a release serves, with its policies in force there and nowhere else."""
    namespace = control_plane.new_namespace("policies")
    helm = Helm(tool("helm"), tmp_path_factory.mktemp("helm"), control_plane.kubeconfig)
    only = ("--set", f"watchNamespace={namespace},replicas=0,rbac.aggregate=false")
    helm.run("install", "policies", CHART, "--namespace", namespace, *only)
    person = as_user(control_plane, namespace, EDITOR)
    deadline = time.monotonic() + IN_FORCE_S
    while "create pods" not in person(ensemble(**RUNTIME)):
        assert time.monotonic() < deadline, "the policy is not in force"
        time.sleep(0.2)
    yield namespace
    helm.run("uninstall", "policies", "--namespace", namespace)


def as_user(
    plane: ControlPlane, namespace: str, user: tuple[str, list[dict[str, Any]]], dry_run: bool = True
) -> Callable[..., str]:
    """A function that sends an ensemble as this user: what the API server says against it, empty if it is taken."""
    token = token_of(plane.kubeconfig_for(*user, namespace=namespace, narrow=True))
    query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")

    def send(document: dict[str, Any], method: str = "POST", name: str = "", kind: str = "application/json") -> str:
        try:
            plane.ask(method, f"{ENSEMBLES.format(namespace)}{name}{query}", document, kind, token)
        except Refused as refused:
            return str(refused.answer["message"])
        return ""

    return send


@pytest.mark.parametrize(
    ("user", "document", "said"),
    [
        (EDITOR, ensemble(), ""),
        (EDITOR, ensemble(podTemplate={}), ""),
        (EDITOR, ensemble(**IMAGE), "create pods"),
        (EDITOR, ensemble(**RUNTIME), "create pods"),
        (EDITOR, ensemble(PLAIN, CLAIM), "create pods"),
        (EDITOR, ensemble(WITH_S3), "create pods"),
        (CREATOR, ensemble(**IMAGE), ""),
        (CREATOR, ensemble(PLAIN, CLAIM), ""),
        (CREATOR, ensemble(PLAIN, WITH_S3), "credentialsSecret s3 needs the right to get"),
        (READER, ensemble(WITH_S3), "create pods"),
        (TRUSTED, ensemble(WITH_S3, WITH_GCS, WITH_S3, CLAIM, **IMAGE), ""),
        (TRUSTED, ensemble(WITH_S3, WITH_GCS, WITH_OTHER), "credentialsSecret other needs the right to get"),
    ],
)
def test_who_may_reach_what(
    control_plane: ControlPlane, served: str, user: tuple[str, list[Any]], document: dict[str, Any], said: str
) -> None:
    answer = as_user(control_plane, served, user)(document)
    assert said in answer if said else answer == ""


def test_the_largest_ensemble_is_within_the_cost_of_rules(control_plane: ControlPlane, served: str) -> None:
    names = [f"secret-{index}" for index in range(9)]
    several = [{"uri": f"s3://{'x' * 1000}/{index}.onnx", "credentialsSecret": names[index % 8]} for index in range(64)]
    person = as_user(control_plane, served, ("many", [EDIT, CREATE_PODS, get_secret(*names)]))
    assert person(ensemble(*several)) == ""
    assert "more than 8" in person(ensemble(*several[1:], {**several[0], "credentialsSecret": names[8]}))
    everyone = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
    person = as_user(control_plane, served, ("all", [EDIT, CREATE_PODS, everyone]))
    assert person(ensemble(*several[1:], {**several[0], "credentialsSecret": names[8]})) == ""


def test_what_was_there_before_does_not_hinder_an_editor(control_plane: ControlPlane, served: str) -> None:
    document = ensemble(WITH_S3, CLAIM, **IMAGE)
    document["metadata"] = {"name": "trusted"}
    assert as_user(control_plane, served, TRUSTED, dry_run=False)(document) == ""
    person = as_user(control_plane, served, EDITOR)
    assert person({"spec": {"devices": {"count": 3}}}, "PATCH", "/trusted", MERGE) == ""
    assert person({"spec": {"replicas": 2}}, "PATCH", "/trusted/scale", MERGE) == ""
    another = copy.deepcopy(document["spec"])
    another["podTemplate"]["gateway"]["image"] = "example.com/other"
    assert "create pods" in person({"spec": another}, "PATCH", "/trusted", MERGE)
    assert person({"spec": {"podTemplate": None}}, "PATCH", "/trusted", MERGE) == ""


def test_tensors_are_immutable(control_plane: ControlPlane, served: str) -> None:
    document = ensemble()
    document["metadata"] = {"name": "plain"}
    person = as_user(control_plane, served, EDITOR, dry_run=False)
    assert person(document) == ""
    changed = {"spec": {"input": {**TENSOR, "shape": [5]}}}
    assert "immutable" in person(changed, "PATCH", "/plain", MERGE)


def test_other_namespaces_are_not_this_releases_business(control_plane: ControlPlane, served: str) -> None:
    elsewhere = control_plane.new_namespace("elsewhere")
    assert as_user(control_plane, elsewhere, EDITOR)(ensemble(**IMAGE)) == ""
