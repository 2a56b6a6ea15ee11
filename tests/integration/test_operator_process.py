"""The operator's process on a real API server: what it follows, what it survives, how it starts and ends."""

from __future__ import annotations

import http
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble_operator.control.kinds import CONFIG_MAP, ENSEMBLE, EVENT, LEASE
from ensemble_operator.control.lease import Terms
from ensemble_operator.control.rbac import own_rules, rules
from tests.support.control_plane import ControlPlane, Refused
from tests.support.tiny_operator import ROOT, TinyOperator, make_ensemble, tiny_operator, until

pytestmark = pytest.mark.timeout(300)


def plan_of(plane: ControlPlane, namespace: str, name: str) -> dict[str, str] | None:
    """The data of an ensemble's plan; None if it is not there."""
    try:
        data: dict[str, str] = plane.ask("GET", CONFIG_MAP.path(namespace, f"{name}-plan"))["data"]
    except Refused:
        return None
    return data


def planned(plane: ControlPlane, namespace: str, name: str, members: str) -> Callable[[], bool]:
    return lambda: (plan_of(plane, namespace, name) or {}).get("members") == members


def delete_unless_collected(plane: ControlPlane, path: str) -> None:
    """Delete what its owner's end may have ended already: other tests may have started the garbage collector."""
    try:
        plane.ask("DELETE", path)
    except Refused as error:
        if error.status != http.HTTPStatus.NOT_FOUND:
            raise


def phase_of(plane: ControlPlane, namespace: str, name: str) -> str:
    found = plane.ask("GET", ENSEMBLE.path(namespace, name))
    return str((found.get("status") or {}).get("phase", ""))


def test_follows_ensembles_and_repairs_their_children(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    plane, settings = control_plane, {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    make_ensemble(plane, namespace, "before", "a", "b")
    with tiny_operator(plane.kubeconfig, tmp_path, "op", **settings) as operator:
        until(planned(plane, namespace, "before", "a,b"), "the plan of what was there")
        make_ensemble(plane, namespace, "after", "c")
        until(planned(plane, namespace, "after", "c"), "the plan of what came")
        make_ensemble(plane, namespace, "after", "c", "d")
        until(planned(plane, namespace, "after", "c,d"), "the plan of what changed")
        plane.ask("DELETE", CONFIG_MAP.path(namespace, "after-plan"))
        until(planned(plane, namespace, "after", "c,d"), "a deleted child")
        plan = CONFIG_MAP.path(namespace, "after-plan")
        plane.ask("PATCH", plan, {"data": {"members": "x"}}, "application/merge-patch+json")
        until(planned(plane, namespace, "after", "c,d"), "an edited child")
        until(lambda: phase_of(plane, namespace, "after") == "Ready", "the status")
        assert "finalizers" not in plane.ask("GET", ENSEMBLE.path(namespace, "after"))["metadata"]

        assert operator.ask("/healthz")[0] == 200
        assert operator.ask("/readyz")[0] == 200
        assert operator.metric("ensemble_operator_leader") == 1
        until(lambda: operator.metric('ensemble_operator_ensembles{phase="Ready"}') == 2, "both to be counted")
        assert operator.metric('ensemble_operator_devices{state="held"}') == 2
        until(lambda: ready_events(plane, namespace) == ["after", "before"], "one event of each")

        assert operator.end() == 0
        assert [line for line in operator.lines() if line["level"] in ("error", "critical")] == []
        lease = plane.ask("GET", LEASE.path(namespace, "ensemble-operator"))
        assert lease["spec"]["holderIdentity"] == ""


def ready_events(plane: ControlPlane, namespace: str) -> list[str]:
    """Whose readiness events tell of."""
    events = plane.ask("GET", EVENT.path(namespace))["items"]
    return sorted(event["regarding"]["name"] for event in events if event["reason"] == "Ready")


def test_idle_it_asks_for_the_lease_only(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    for number in range(20):
        make_ensemble(control_plane, namespace, f"e{number}", "a")
    with tiny_operator(control_plane.kubeconfig, tmp_path, "op", **settings) as operator:
        last = [planned(control_plane, namespace, f"e{number}", "a") for number in range(20)]
        until(lambda: all(holds() for holds in last), "all plans")
        until(lambda: len(ready_events(control_plane, namespace)) == 20, "all events")
        until(lambda: set(asked_in(operator, 2)) <= LEASE_ONLY, "the last changes to come to rest")
        began = time.monotonic()
        asked = asked_in(operator, 8)
    assert set(asked) == LEASE_ONLY
    renewals_at_most = (time.monotonic() - began) / Terms().retry_s + 1
    assert sum(asked.values()) <= renewals_at_most


LEASE_ONLY = {'verb="update",resource="leases",code="200"'}


def asked_in(operator: TinyOperator, seconds: float) -> dict[str, float]:
    """What the API server is asked for in so many seconds."""
    before = requests(operator.ask("/metrics")[1])
    time.sleep(seconds)
    after = requests(operator.ask("/metrics")[1])
    return {what: count - before.get(what, 0) for what, count in after.items() if count != before.get(what, 0)}


def requests(page: str) -> dict[str, float]:
    """Requests to the API server by their labels."""
    name = "ensemble_operator_api_requests_total{"
    lines = [line for line in page.splitlines() if line.startswith(name)]
    return {line[len(name) : line.index("}")]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.mark.slow
def test_a_server_that_is_away_is_survived(tmp_path: Path, own_plane: ControlPlane) -> None:
    """Killed for 20 s with its history compacted, and what went and changed meanwhile is seen."""
    plane = own_plane
    namespace = plane.new_namespace()
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    for name in ("stays", "goes"):
        make_ensemble(plane, namespace, name, "a")
    with tiny_operator(plane.kubeconfig, tmp_path, "op", **settings) as operator:
        until(planned(plane, namespace, "stays", "a"), "the plan")
        until(planned(plane, namespace, "goes", "a"), "the plan")
        operator.process.send_signal(signal.SIGSTOP)
        make_ensemble(plane, namespace, "stays", "a", "b")
        plane.ask("DELETE", ENSEMBLE.path(namespace, "goes"))
        delete_unless_collected(plane, CONFIG_MAP.path(namespace, "goes-plan"))
        plane.kill_api_server()
        operator.process.send_signal(signal.SIGCONT)
        plane.compact()
        time.sleep(20)
        assert operator.process.poll() is None
        plane.start_api_server()
        until(planned(plane, namespace, "stays", "a,b"), "the plan after the outage")
        until(lambda: operator.metric("ensemble_operator_leader") == 1, "leadership after the outage")
        until(lambda: operator.metric('ensemble_operator_ensembles{phase="Ready"}') == 1, "the loss to be noticed")
        time.sleep(2)
        assert plan_of(plane, namespace, "goes") is None
        make_ensemble(plane, namespace, "new", "c")
        until(planned(plane, namespace, "new", "c"), "a new one after the outage")
        assert operator.end() == 0


@pytest.mark.slow
def test_a_definition_that_is_deleted_and_installed_again(tmp_path: Path, own_plane: ControlPlane) -> None:
    plane = own_plane
    namespace = plane.new_namespace()
    make_ensemble(plane, namespace, "e", "a")
    definition = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{ENSEMBLE.plural}.{ENSEMBLE.group}"
    with tiny_operator(plane.kubeconfig, tmp_path, "op", POD_NAMESPACE=namespace) as operator:
        until(planned(plane, namespace, "e", "a"), "the plan")
        plane.ask("DELETE", definition)
        operator.wait_said("install its definition (the folder crds)")
        plane.install_crds()
        make_ensemble(plane, namespace, "e", "a", "b")
        until(planned(plane, namespace, "e", "a,b"), "the plan after it is back")
        make_ensemble(plane, namespace, "new", "c")
        until(planned(plane, namespace, "new", "c"), "what is new after it is back")
        assert operator.end() == 0


@pytest.mark.slow
def test_a_server_that_hangs_is_survived(tmp_path: Path, own_plane: ControlPlane) -> None:
    plane = own_plane
    namespace = plane.new_namespace()
    make_ensemble(plane, namespace, "e", "a")
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    with tiny_operator(plane.kubeconfig, tmp_path, "op", **settings) as operator:
        until(planned(plane, namespace, "e", "a"), "the plan")
        plane.freeze_api_server()
        operator.wait_said("nothing is done until it is")
        assert operator.metric("ensemble_operator_leader") == 0
        assert operator.ask("/healthz")[0] == 200
        plane.thaw_api_server()
        operator.wait_said("the lease is renewed: work goes on")
        make_ensemble(plane, namespace, "e", "a", "b")
        until(planned(plane, namespace, "e", "a,b"), "the plan after the freeze")
        assert operator.end() == 0


def role(without: tuple[str, str] | None = None) -> list[dict[str, list[str]]]:
    """The operator's rules; `without` a (resource, verb)."""
    found = []
    for rule in rules() + own_rules():
        verbs = [verb for verb in rule["verbs"] if (rule["resources"][0], verb) != without]
        found += [{**rule, "verbs": verbs}] if verbs else []
    return found


def test_the_role_suffices(own_plane: ControlPlane, tmp_path: Path) -> None:
    """All namespaces are served, with the operator's own rules and nothing else."""
    plane = own_plane
    namespace = plane.new_namespace()
    kubeconfig = plane.kubeconfig_for("operator", role(), namespace=namespace)
    make_ensemble(plane, namespace, "e", "a")
    with tiny_operator(kubeconfig, tmp_path, "op", POD_NAMESPACE=namespace) as operator:
        until(planned(plane, namespace, "e", "a"), "the plan")
        make_ensemble(plane, namespace, "e", "b")
        until(planned(plane, namespace, "e", "b"), "the plan after a change")
        until(lambda: phase_of(plane, namespace, "e") == "Ready", "the status")
        assert operator.end() == 0
        # In our words and in those of kopf and the API server.
        refused = re.compile("may not|forbidden|permission", re.IGNORECASE)
        assert [line for line in operator.lines() if refused.search(line["message"])] == []
        assert [line for line in operator.lines() if line["level"] in ("error", "critical")] == []


@pytest.mark.parametrize(
    ("resource", "verb"),
    [
        ("leases", "update"),
        ("configmaps", "list"),
        ("configmaps", "watch"),
        ("configmaps", "patch"),
        ("configmaps", "create"),
        ("inferenceensembles", "list"),
        ("inferenceensembles", "watch"),
        ("inferenceensembles/status", "patch"),
        ("events", "create"),
    ],
)
def test_a_missing_verb_is_named(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, resource: str, verb: str
) -> None:
    kubeconfig = control_plane.kubeconfig_for("operator", role((resource, verb)), namespace=namespace, narrow=True)
    if resource == "leases":
        # To take it needs `update` only where it is there already.
        control_plane.ask("POST", LEASE.path(namespace), {"metadata": {"name": "ensemble-operator"}})
    make_ensemble(control_plane, namespace, "e", "a")
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    with tiny_operator(kubeconfig, tmp_path, "op", **settings) as operator:
        operator.wait_said(f"may not {verb} {resource} in namespace '{namespace}': add to its role the rule")
        assert operator.process.poll() is None
        assert operator.end() == 0


def test_settings_that_are_wrong_are_told_in_one_line() -> None:
    done = start_command({"ENSEMBLE_OPERATOR_WORKERS": "none"})
    assert done.returncode == 1
    assert done.stderr == "ensemble: ENSEMBLE_OPERATOR_WORKERS: 'none' is not a whole number in 1..256\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file or directory"),
        ("", "not a kubeconfig"),
        ("{", "while parsing"),
        ("- a list\n", ""),
        ("apiVersion: v1\nclusters: []\ncontexts: []\ncurrent-context: x\n", "Expected object with name x in"),
    ],
)
def test_no_cluster_is_told_without_a_traceback(tmp_path: Path, text: str | None, why: str) -> None:
    kubeconfig = tmp_path / "config"
    if text is not None:
        kubeconfig.write_text(text)
    done = start_command({"KUBECONFIG": str(kubeconfig)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"ensemble: {kubeconfig}: ")
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("; name another kubeconfig with --kubeconfig or KUBECONFIG\n")


def test_a_port_in_use_is_told_in_one_line(control_plane: ControlPlane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start_command({"KUBECONFIG": str(control_plane.kubeconfig), "ENSEMBLE_OPERATOR_HEALTH_PORT": str(port)})
    assert done.returncode == 6
    assert done.stderr == (
        f"ensemble: port {port}: Address already in use: choose another with ENSEMBLE_OPERATOR_HEALTH_PORT\n"
    )


def start_command(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`ensemble operator`, without a user's name and home."""
    return subprocess.run(
        [sys.executable, "-m", "ensemble_operator", "operator"],
        cwd=ROOT,
        env={"PATH": "/usr/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_slow_reconcile_may_end_after_sigterm(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    make_ensemble(control_plane, namespace, "e", "a", annotations={"slow": "6"})
    with tiny_operator(control_plane.kubeconfig, tmp_path, "op", **settings) as operator:
        operator.wait_said("serving 1 InferenceEnsembles")
        time.sleep(1)
        assert plan_of(control_plane, namespace, "e") is None
        assert operator.end() == 0
    assert plan_of(control_plane, namespace, "e") is not None


def test_log_lines_name_the_ensemble(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> None:
    make_ensemble(control_plane, namespace, "broken", "a", annotations={"slow": "not a number"})
    make_ensemble(control_plane, namespace, "sound", "a")
    settings = {"NAMESPACE": namespace, "POD_NAMESPACE": namespace}
    with tiny_operator(control_plane.kubeconfig, tmp_path, "op", **settings) as operator:
        until(planned(control_plane, namespace, "sound", "a"), "the sound one, beside a broken one")
        operator.wait_said("unexpected; tried again")
        line = next(line for line in operator.lines() if "unexpected" in line["message"])
        assert line["ensemble"] == f"{namespace}/broken"
        assert "ValueError" in line["error"]
        assert operator.metric('ensemble_operator_reconcile_failures_total{reason="ValueError"}') >= 1
        assert json.dumps(line).count("\\n") > 3
