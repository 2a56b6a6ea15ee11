"""What the chart makes of values: what is there, what is refused, and what belongs together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_operator.control import rbac
from ensemble_operator.control.settings import PREFIX, Settings
from tests.chart.helm import CASES, CHART, Helm, is_hook, only, pod_templates

EVERYTHING = CHART.parents[1] / "tests/chart/cases/everything.yaml"
NUMBERS = CHART.parents[1] / "tests/chart/cases/numbers.yaml"
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
    found = settings_of(only(helm.render("--values", EVERYTHING), "Deployment"))
    assert found == Settings(
        namespace="",
        pod_namespace="from-the-pod",
        pod_name="from-the-pod",
        lease_name="release-ensemble-operator",
        worker_image=f"registry.example.com/team/worker@sha256:{'0123456789abcdef' * 4}",
        gateway_image="registry.example.com/team/gateway:v9",
        image_pull_policy="Always",
        image_pull_secrets=("pull", "mirror"),
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
        ("rbac=null", "missing property 'rbac'"),
        ("networkPolicy=null", "missing property 'networkPolicy'"),
        ("images.gateway=null", "missing property 'gateway'"),
        ("resources.limit.memory=1Gi", "limit"),
        ("resources.limits.memory=true", "limits/memory"),
        ("tolerations[0].keys=gpu", "keys"),
        ("tolerations[0].operator=Is", "operator"),
        ("affinity.nodeAfinity.weight=1", "nodeAfinity"),
        ("extraEnv[0].name=ENSEMBLE_OPERATOR_WORKERS", "extraEnv/0/name"),
        ("extraEnv[0].names=HTTPS_PROXY", "names"),
        ("images.registry=https://registry.example.com", "registry"),
        ("images.pullSecrets[0].name=Pull", "pullSecrets"),
        ("fullnameOverride=Mine", "fullnameOverride"),
        ("nameOverride=4th", "nameOverride"),
        ("watchNamespace=123", "got number, want string"),
        ("metrics.podMonitor.interval=often", "interval"),
        ("metrics.podMonitor.interval=1d", "interval"),
    ],
)
def test_bad_values_are_refused_by_name(helm: Helm, values: str, said: str) -> None:
    assert said in helm.refusal("--set", values)


@pytest.mark.parametrize(
    ("values", "allowed", "policies"),
    [
        ("allowOverrides=true", True, {"immutable", "overrides"}),
        ("allowOverrides=false", False, {"immutable", "overrides"}),
        ("allowOverrides=false,admissionPolicies.create=false", False, set()),
    ],
)
def test_overrides_are_allowed_only_together_with_the_policy(
    helm: Helm, values: str, allowed: bool, policies: set[str]
) -> None:
    manifests = helm.render("--set", values)
    assert settings_of(only(manifests, "Deployment")).allow_overrides is allowed
    for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"):
        assert {m["metadata"]["name"].rpartition("-")[2] for m in manifests if m["kind"] == kind} == policies


def test_two_releases_share_no_name_in_the_cluster(helm: Helm) -> None:
    def named(name: str, namespace: str) -> set[tuple[str, str]]:
        found = helm.render(name=name, namespace=namespace)
        return {(m["kind"], m["metadata"]["name"]) for m in found if m["kind"].startswith(("Cluster", "Validating"))}

    assert named("a", "one").isdisjoint(named("a", "two"))
    assert named("a", "one").isdisjoint(named("b", "one"))


def test_two_releases_in_one_namespace_share_nothing(helm: Helm) -> None:
    def named(name: str) -> set[tuple[str, str, str]]:
        found = helm.render("--values", EVERYTHING, "--set", f"watchNamespace={name}", name=name)
        return {(m["kind"], m["metadata"].get("namespace", ""), m["metadata"]["name"]) for m in found}

    assert named("a") & named("b") == {("ServiceAccount", "", "someone")}, "that case names its own"
    leases = {settings_of(only(helm.render(name=name), "Deployment")).lease_name for name in ("a", "b")}
    assert leases == {"a-ensemble-operator", "b-ensemble-operator"}


@pytest.mark.parametrize(
    ("release", "whole"),
    [
        ("vision", "vision-ensemble-operator"),
        ("my-ensemble-operator", "my-ensemble-operator"),
        ("no", "no-ensemble-operator"),
        ("123", "ensemble-operator-123"),
        ("v1.2", "v1-2-ensemble-operator"),
        ("a" * 53, "a" * 40),
    ],
)
def test_names_are_those_of_services(helm: Helm, release: str, whole: str) -> None:
    manifests = helm.render("--values", EVERYTHING, name=release)
    assert only(manifests, "Deployment")["metadata"]["name"] == whole
    services = [m["metadata"]["name"] for m in manifests if m["kind"] in ("Service", "InferenceEnsemble")]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in services), services


@pytest.mark.parametrize(
    ("name", "namespace"), [("123", "456"), ("no", "yes"), ("1e3", "0x10"), ("null", "2001-01-01")]
)
def test_what_looks_like_another_type_stays_text(helm: Helm, name: str, namespace: str) -> None:
    manifests = helm.render("--values", NUMBERS, name=name, namespace=namespace)
    for manifest in manifests:
        assert not list(other_than_text(manifest["metadata"])), manifest["metadata"]
        for key in ("subjects", "roleRef"):
            assert not list(other_than_text(manifest.get(key)))
    for template in pod_templates(manifests):
        assert not list(other_than_text(template["metadata"]["labels"]))
        assert not list(
            other_than_text([template["spec"].get("nodeSelector"), template["spec"].get("imagePullSecrets")])
        )
        assert isinstance(template["spec"]["containers"][0]["image"], str)
    assert only(manifests, "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["123"]}
    assert only(manifests, "ServiceMonitor")["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == name


def other_than_text(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from other_than_text(item)
    elif not isinstance(value, str | None):
        yield value


def test_pods_of_helm_test_are_pulled_and_placed_like_the_operators(helm: Helm) -> None:
    manifests = helm.render("--values", EVERYTHING)
    operators, *tests = (template["spec"] for template in pod_templates(manifests))
    assert len(tests) == 2
    for pod in tests:
        for key in ("imagePullSecrets", "nodeSelector", "tolerations"):
            assert pod[key] == operators[key]


@pytest.mark.parametrize(
    ("values", "told"),
    [("replicas=1", True), ("replicas=0", False), ("metrics.serviceMonitor.create=false", False)],
)
def test_a_leader_is_missed_only_where_one_is_to_be_seen(helm: Helm, values: str, told: bool) -> None:
    groups = only(helm.render("--values", EVERYTHING, "--set", values), "PrometheusRule")["spec"]["groups"]
    rules = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    ours = '{namespace="system",service="release-ensemble-operator-metrics"}'
    missed = f"absent(ensemble_operator_leader{ours} == 1)" if told else None
    assert rules.get("EnsembleOperatorWithoutLeader") == missed
    written = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in written) - (not told)


def test_every_setting_of_the_operator_has_a_value_or_is_for_development() -> None:
    written = (CHART / "templates/deployment.yaml").read_text()
    development = {"admin_url", "worker_host", "resync_s"}
    for name in Settings.__dataclass_fields__:
        assert (f"{PREFIX}{name.upper()}\n" in written) is (name not in development), name


def test_prometheus_is_told_where_the_ports_are(helm: Helm) -> None:
    manifests = helm.render("--values", EVERYTHING)
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
