"""What the chart makes of values: what is there, what is refused, and what belongs together."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ensemble_operator.control import rbac
from ensemble_operator.control.settings import PREFIX, Settings
from tests.chart.helm import CASES, CHART, Helm, is_hook, only, pod_templates

RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def settings_of(deployment: dict[str, object]) -> Settings:
    """What the operator reads from the Deployment's environment."""
    container = deployment["spec"]["template"]["spec"]["containers"][0]  # type: ignore[index]
    environment = {entry["name"]: entry.get("value", "from-the-pod") for entry in container["env"]}
    return Settings.from_environment(environment)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_lint_finds_nothing(helm: Helm, case: Path) -> None:
    helm.run("lint", CHART, "--strict", "--values", case, "--kube-version", "1.30.0")


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_every_pod_is_restricted_and_only_the_operators_has_a_token(helm: Helm, case: Path) -> None:
    manifests = helm.render("--values", case)
    templates = list(pod_templates(manifests))
    assert len(templates) == 3
    for template in templates:
        pod = template["spec"]
        operates = template["metadata"]["labels"].get("app.kubernetes.io/component") == "operator"
        assert pod["automountServiceAccountToken"] is operates
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == RESTRICTED
            assert container["resources"]["requests"]


def test_the_operator_reads_what_the_chart_writes(helm: Helm) -> None:
    case = CHART.parents[1] / "tests/chart/cases/everything.yaml"
    found = settings_of(only(helm.render("--values", case), "Deployment"))
    assert found == Settings(
        namespace="",
        pod_namespace="from-the-pod",
        pod_name="from-the-pod",
        worker_image=f"registry.example.com/team/worker@sha256:{'0123456789abcdef' * 4}",
        gateway_image="registry.example.com/team/gateway:v9",
        image_pull_policy="Always",
        allow_overrides=True,
        workers=2,
        log_format="text",
        log_level="DEBUG",
    )


def test_defaults_serve_all_namespaces_with_the_images_of_the_chart(helm: Helm) -> None:
    manifests = helm.render()
    deployment = only(manifests, "Deployment")
    found = settings_of(deployment)
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert (found.namespace, found.worker_image) == ("", f"localhost/worker:{version}")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"localhost/operator:{version}"
    role = only(manifests, "ClusterRole", ending="operator")
    assert role["rules"] == rbac.rules()
    assert only(manifests, "Role")["rules"] == rbac.own_rules()
    assert only(manifests, "ClusterRoleBinding")["roleRef"]["name"] == role["metadata"]["name"]


def test_one_namespace_has_a_role_there_and_nothing_in_the_cluster(helm: Helm) -> None:
    manifests = helm.render("--set", "watchNamespace=vision,rbac.aggregate=false")
    assert {m["kind"] for m in manifests}.isdisjoint({"ClusterRole", "ClusterRoleBinding"})
    roles = {m["metadata"].get("namespace"): m for m in manifests if m["kind"] == "Role"}
    assert roles["vision"]["rules"] == rbac.rules(cluster_wide=False)
    assert roles[None]["rules"] == rbac.own_rules()
    assert settings_of(only(manifests, "Deployment")).namespace == "vision"
    for binding in (m for m in manifests if m["kind"] == "ValidatingAdmissionPolicyBinding"):
        selected = binding["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
        assert selected == {"kubernetes.io/metadata.name": "vision"}
    assert {m["metadata"]["namespace"] for m in manifests if is_hook(m)} == {"vision"}


def test_a_second_replica_brings_a_budget_and_spreads(helm: Helm) -> None:
    assert not [m for m in helm.render() if m["kind"] == "PodDisruptionBudget"]
    manifests = helm.render("--set", "replicas=2")
    deployment = only(manifests, "Deployment")
    selector = deployment["spec"]["selector"]
    assert only(manifests, "PodDisruptionBudget")["spec"] == {"maxUnavailable": 1, "selector": selector}
    assert deployment["spec"]["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"] == selector


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("replicaCount=2", "replicaCount"),
        ("images.operator.name=x", "name"),
        ("metrics.dashboard.enabled=true", "enabled"),
        ("replicas=two", "replicas"),
        ("replicas=6", "replicas"),
        ("images.pullPolicy=Sometimes", "pullPolicy"),
        ("images.worker.digest=sha256:12", "digest"),
        ("watchNamespace=Not_A_Name", "watchNamespace"),
        ("logFormat=xml", "logFormat"),
        ("concurrency=0", "concurrency"),
        ("admissionPolicies.create=false", "allowOverrides=true needs admissionPolicies.create=true"),
        ("serviceAccount.create=false", "serviceAccount.name is needed"),
    ],
)
def test_bad_values_are_refused_by_name(helm: Helm, values: str, said: str) -> None:
    assert said in helm.refusal("--set", values)


@pytest.mark.parametrize("allowed", [True, False])
def test_overrides_are_allowed_only_together_with_the_policy(helm: Helm, allowed: bool) -> None:
    manifests = helm.render("--set", f"allowOverrides={str(allowed).lower()}")
    policies = [
        m for m in manifests if m["kind"] == "ValidatingAdmissionPolicy" and "overrides" in m["metadata"]["name"]
    ]
    assert settings_of(only(manifests, "Deployment")).allow_overrides is allowed
    assert len(policies) == int(allowed)


def test_two_releases_share_no_name_in_the_cluster(helm: Helm) -> None:
    def named(name: str, namespace: str) -> set[tuple[str, str]]:
        found = helm.render(name=name, namespace=namespace)
        return {(m["kind"], m["metadata"]["name"]) for m in found if m["kind"].startswith(("Cluster", "Validating"))}

    assert named("a", "one").isdisjoint(named("a", "two"))
    assert named("a", "one").isdisjoint(named("b", "one"))


def test_every_setting_of_the_operator_has_a_value_or_is_for_development() -> None:
    written = (CHART / "templates/deployment.yaml").read_text()
    development = {"admin_url", "worker_host", "resync_s"}
    for name in Settings.__dataclass_fields__:
        assert (f"{PREFIX}{name.upper()}\n" in written) is (name not in development), name


def test_prometheus_is_told_where_the_ports_are(helm: Helm) -> None:
    case = CHART.parents[1] / "tests/chart/cases/everything.yaml"
    manifests = helm.render("--values", case)
    monitor = only(manifests, "ServiceMonitor")
    service = only(manifests, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert [port["name"] for port in service["spec"]["ports"]] == [monitor["spec"]["endpoints"][0]["port"]]
    ports = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert {port["name"]: port["containerPort"] for port in ports} == {"metrics": 9090, "health": 8080}
    assert only(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == "http"
    assert only(manifests, "ConfigMap", ending="dashboard")["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_notes_tell_the_next_command() -> None:
    notes = (CHART / "templates/NOTES.txt").read_text()
    for command in ("helm test", "kubectl apply", "kubectl wait", "kubectl describe", "helm show crds"):
        assert command in notes
