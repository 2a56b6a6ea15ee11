"""A real API server takes all that the chart renders; Helm installs, upgrades, rolls back and uninstalls it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.helm import CASES, CHART, Helm, pod_templates, tool
from tests.support.control_plane import ControlPlane, Refused

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceensembles.ensemble-operator.io"
MONITORING = Path(__file__).parent / "monitoring.yaml"
TINY = {
    "apiVersion": "ensemble-operator.io/v1alpha1",
    "kind": "InferenceEnsemble",
    "metadata": {"name": "kept"},
    "spec": {"members": [{"name": "a", "model": {"uri": "http://models/a.onnx"}}], "devices": {"count": 1}},
}


def kubectl(plane: ControlPlane, *arguments: str, content: str = "") -> str:
    """What kubectl says; its failure is the test's."""
    command = [str(tool("kubectl")), "--kubeconfig", str(plane.kubeconfig), *arguments]
    done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def monitoring(control_plane: ControlPlane) -> None:
    """The API server knows the Prometheus operator's kinds."""
    kubectl(control_plane, "apply", "--server-side", "-f", str(MONITORING))
    kubectl(control_plane, "wait", "--for=condition=Established", "--timeout=30s", "-f", str(MONITORING))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_the_api_server_takes_every_manifest(
    helm: Helm, control_plane: ControlPlane, namespace: str, case: Path
) -> None:
    served = yaml.safe_load(case.read_text()).get("watchNamespace")
    values = ["--set", f"watchNamespace={namespace}"] if served else []
    manifests = helm.render("--values", case, *values, namespace=namespace)
    assert manifests
    flags = ("--server-side", "--dry-run=server", "--validate=strict", "--field-manager=tests", "-n", namespace)
    applied = kubectl(
        control_plane,
        "apply",
        *flags,
        "-f",
        "-",
        content=json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests}),
    )
    assert len(applied.splitlines()) == len(manifests), applied


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_every_pod_is_admitted_where_restricted_is_enforced(
    helm: Helm, control_plane: ControlPlane, case: Path
) -> None:
    namespace = control_plane.new_namespace("restricted", {"pod-security.kubernetes.io/enforce": "restricted"})
    for index, template in enumerate(pod_templates(helm.render("--values", case))):
        pod = {"metadata": {"name": f"pod-{index}", "labels": template["metadata"]["labels"]}, "spec": template["spec"]}
        pod["spec"].pop("serviceAccountName", None)
        pod["spec"].pop("priorityClassName", None)
        control_plane.ask("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict", pod)


@pytest.fixture
def release(helm_there: Helm, namespace: str) -> Iterator[tuple[Helm, str]]:
    """A release that is not there yet, and its namespace. It is removed at the end."""
    yield helm_there, namespace
    helm_there.run("uninstall", "ensembles", "--namespace", namespace, "--ignore-not-found")


def test_the_life_of_a_release(release: tuple[Helm, str], control_plane: ControlPlane) -> None:
    helm, namespace = release
    there = ("--namespace", namespace)
    deployment = f"/apis/apps/v1/namespaces/{namespace}/deployments/ensembles-ensemble-operator"

    def image() -> Any:
        found = control_plane.ask("GET", deployment)
        return found["spec"]["template"]["spec"]["containers"][0]["image"]

    installed = helm.run("install", "ensembles", CHART, *there, "--set", "images.tag=one")
    assert f"helm test ensembles --namespace {namespace}" in installed.stdout
    assert "helm show crds" in installed.stdout
    assert image() == "localhost/operator:one"
    upgraded = helm.run("upgrade", "ensembles", CHART, *there, "--set", "images.tag=two,replicas=2")
    assert "helm show crds" in upgraded.stdout
    assert image() == "localhost/operator:two"
    helm.run("rollback", "ensembles", "1", *there)
    assert image() == "localhost/operator:one"
    control_plane.ask("POST", f"/apis/ensemble-operator.io/v1alpha1/namespaces/{namespace}/inferenceensembles", TINY)
    helm.run("uninstall", "ensembles", *there)
    with pytest.raises(Refused) as gone:
        control_plane.ask("GET", deployment)
    assert gone.value.status == 404
    assert control_plane.ask("GET", CRD)["status"]["acceptedNames"]["kind"] == "InferenceEnsemble"
    kept = f"/apis/ensemble-operator.io/v1alpha1/namespaces/{namespace}/inferenceensembles/kept"
    assert control_plane.ask("GET", kept)["spec"]["members"]
    rights = control_plane.ask("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles")["items"]
    assert not [role for role in rights if role["metadata"]["name"].startswith(f"{namespace}-ensembles")]


def test_the_definition_is_upgraded_by_the_documented_command(
    release: tuple[Helm, str], control_plane: ControlPlane
) -> None:
    helm, namespace = release
    current = yaml.safe_load((CHART / "crds/ensemble-operator.io_inferenceensembles.yaml").read_text())
    helm.run("install", "ensembles", CHART, "--namespace", namespace)
    control_plane.ask("PATCH", CRD, {"spec": {"names": {"categories": []}}}, "application/merge-patch+json")
    helm.run("upgrade", "ensembles", CHART, "--namespace", namespace)
    assert not control_plane.ask("GET", CRD)["spec"]["names"].get("categories"), "Helm upgraded it by itself"
    shown = helm.run("show", "crds", CHART).stdout
    kubectl(control_plane, "apply", "--server-side", "--force-conflicts", "-f", "-", content=shown)
    assert control_plane.ask("GET", CRD)["spec"]["names"]["categories"] == current["spec"]["names"]["categories"]


def test_a_monitor_with_a_field_that_prometheus_does_not_have_is_refused(
    control_plane: ControlPlane, namespace: str
) -> None:
    """The definitions that stand for the Prometheus operator's are closed."""
    spec = {"selector": {}, "endpoints": [{"port": "metrics", "intervall": "5s"}]}
    monitor = {"metadata": {"name": "monitor"}, "spec": spec}
    path = f"/apis/monitoring.coreos.com/v1/namespaces/{namespace}/servicemonitors?fieldValidation=Strict&dryRun=All"
    with pytest.raises(Refused, match="intervall"):
        control_plane.ask("POST", path, monitor)


def test_every_kind_of_the_prometheus_operator_is_among_the_cases(helm: Helm) -> None:
    rendered = {manifest["kind"] for case in CASES for manifest in helm.render("--values", case)}
    assert {crd["spec"]["names"]["kind"] for crd in yaml.safe_load_all(MONITORING.read_text())} <= rendered
