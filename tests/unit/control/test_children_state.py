"""Drift, keys, pods and overrides: what is read from objects, and what is made of it."""

from __future__ import annotations

import base64
import copy
import dataclasses
import itertools
from typing import Any

import pytest

from ensemble_operator.api import PodOverrides
from ensemble_operator.control.drift import Applied
from ensemble_operator.control.keyring import contents_of, keyring
from ensemble_operator.control.overrides import REACHING, check_allowed, remarks
from ensemble_operator.control.pods import UNREACHABLE_AFTER_S, read_pod, read_pods
from ensemble_operator.control.times import unix_time
from ensemble_operator.errors import InvalidSpec
from ensemble_operator.keys import new_pair
from tests.unit.control.ensembles import ensemble

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "tiny", "labels": {"ours": "1"}, "ownerReferences": [{"uid": "u"}]},
    "spec": {"ports": [{"port": 80}]},
}
LIVE: dict[str, Any] = {
    "kind": "Service",
    "metadata": {**SERVICE["metadata"], "uid": "x", "resourceVersion": "7", "generation": 1},
    "spec": {"ports": [{"port": 80, "protocol": "TCP"}], "clusterIP": "10.0.0.1"},
    "status": {},
}


def changed(**parts: Any) -> dict[str, Any]:
    live = copy.deepcopy(LIVE)
    for name, part in parts.items():
        live[name] = {**live[name], **part}
    return live


def test_defaults_and_what_users_add_are_no_drift() -> None:
    applied = Applied()
    assert not applied.is_settled(SERVICE, LIVE), "a new process applies everything once"
    applied.note(SERVICE, LIVE)
    assert applied.is_settled(SERVICE, LIVE)
    labelled = changed(metadata={"labels": {"ours": "1", "theirs": "2"}, "resourceVersion": "9"}, status={"x": 1})
    assert applied.is_settled(SERVICE, labelled)


@pytest.mark.parametrize(
    "live",
    [
        None,
        changed(spec={"ports": [{"port": 81, "protocol": "TCP"}]}),
        changed(metadata={"labels": {"ours": "2"}}),
        changed(metadata={"ownerReferences": []}),
        changed(metadata={"uid": "made anew"}),
    ],
)
def test_everything_else_is(live: dict[str, Any] | None) -> None:
    applied = Applied()
    applied.note(SERVICE, LIVE)
    assert not applied.is_settled(SERVICE, live)
    wanted = {**SERVICE, "spec": {"ports": [{"port": 82}]}}
    assert not applied.is_settled(wanted, LIVE)


def ring(worker: dict[str, str] | None, gateway: dict[str, str] | None, *, encrypted: bool = True) -> Any:
    count = itertools.count()
    return keyring(
        worker, gateway, encrypted=encrypted, new_pair=new_pair, new_token=lambda: f"token-{next(count)}-of-a-test"
    )


def test_keys_are_kept_and_what_is_lost_is_made_anew_for_both_sides() -> None:
    first = ring(None, None)
    assert first.worker["peer.public"] == first.gateway["own.public"]
    assert first.gateway["peer.public"] == first.worker["own.public"]
    assert first.worker["admin.token"] == first.gateway["admin.token"] == first.token
    assert ring(dict(first.worker), dict(first.gateway)) == first
    mended = ring(None, dict(first.gateway))
    assert mended.gateway["own.secret"] == first.gateway["own.secret"]
    assert mended.worker["own.secret"] != first.worker["own.secret"]
    assert mended.gateway["peer.public"] == mended.worker["own.public"]
    assert mended.token == first.token
    damaged = ring({**first.worker, "own.secret": "short"}, dict(first.gateway))
    assert damaged.worker["own.public"] != first.worker["own.public"]


def test_without_encryption_there_is_a_token_only() -> None:
    found = ring(None, None, encrypted=False)
    assert set(found.worker) == set(found.gateway) == {"admin.token"}


def test_a_secret_that_is_no_text_is_not_believed() -> None:
    secret = {"data": {"a": base64.b64encode(b"text\n").decode(), "b": "***", "c": base64.b64encode(b"\xff").decode()}}
    assert contents_of(secret) == {"a": "text"}
    assert contents_of(None) is None


def a_pod(**status: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/component": "worker", "ensemble-operator.io/pool": "1"}
    metadata = {"name": "tiny-worker-x1-12", "uid": "u", "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"}
    spec = {"nodeName": "n1", "containers": [{"image": "worker:1"}]}
    return {"metadata": metadata, "spec": spec, "status": status}


def test_pods_are_read() -> None:
    ready = {"type": "Ready", "status": "True"}
    found = read_pod(a_pod(podIP="10.0.0.7", conditions=[ready], containerStatuses=[{"restartCount": 3}]))
    assert found is not None
    assert (found.pool, found.ordinal, found.ip, found.ready, found.away_since) == (1, 12, "10.0.0.7", True, None)
    restarted = read_pod(a_pod(conditions=[ready], containerStatuses=[{"restartCount": 4}]))
    assert restarted is not None
    assert restarted.life != found.life
    assert read_pod(a_pod(phase="Failed")) is None
    assert read_pods([a_pod()], "gateway") == ()


def test_why_a_pod_does_not_run_is_told() -> None:
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    broken = read_pod(a_pod(containerStatuses=[waiting]))
    assert broken is not None
    assert broken.trouble == "ImagePullBackOff: no such image"
    pending = read_pod(a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}]))
    assert pending is not None
    assert pending.unschedulable == "0/1 nodes"
    assert not pending.is_coming(pending.created + 1)
    starting = read_pod(a_pod())
    assert starting is not None
    assert starting.is_coming(starting.created + 1)
    assert not starting.is_coming(starting.created + 3600)


def test_a_pod_that_should_be_gone_is_stuck() -> None:
    leaving = a_pod()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:30Z"
    found = read_pod(leaving)
    assert found is not None
    assert found.leaving_since is not None
    assert not found.is_stuck(found.leaving_since + 1)
    assert found.is_stuck(found.leaving_since + UNREACHABLE_AFTER_S + 1)


@pytest.mark.parametrize(
    ("away", "reason", "stuck"),
    [
        ("2026-01-01T00:00:00Z", "DeletionByTaintManager", True),
        # It was Ready until it was told to leave: its kubelet is there and ends it.
        ("2026-01-01T00:00:31Z", "DeletionByTaintManager", False),
        ("2026-01-01T00:00:00Z", "EvictionByEvictionAPI", False),
    ],
)
def test_a_pod_evicted_from_a_node_that_is_gone_is_stuck_at_once(away: str, reason: str, stuck: bool) -> None:
    evicted = a_pod(
        conditions=[
            {"type": "Ready", "status": "False", "lastTransitionTime": away},
            {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": reason,
                "lastTransitionTime": "2026-01-01T00:00:30Z",
            },
        ]
    )
    alive = read_pod(evicted)
    assert alive is not None
    assert not alive.is_stuck(unix_time("2026-01-01T01:00:00Z"))
    evicted["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
    found = read_pod(evicted)
    assert found is not None
    assert found.is_stuck(unix_time("2026-01-01T00:00:32Z")) is stuck


def test_what_reaches_further_is_refused_with_its_path_unless_allowed() -> None:
    reaching = ensemble(
        members=[{"name": "a", "model": {"uri": "pvc://claim/a.pt2", "credentialsSecret": "keys"}}],
        podTemplate={
            "worker": {"labels": {"x": "y"}, "priorityClassName": "high"},
            "gateway": {"volumes": [{"name": "v", "emptyDir": {}}], "annotations": {"x": "y"}, "runtimeClassName": "r"},
        },
    )
    with pytest.raises(InvalidSpec) as caught:
        check_allowed(reaching, allow_overrides=False)
    assert [problem.path for problem in caught.value.problems] == [
        "spec.podTemplate.worker.labels",
        "spec.podTemplate.worker.priorityClassName",
        "spec.podTemplate.gateway.volumes",
        "spec.podTemplate.gateway.annotations",
        "spec.podTemplate.gateway.runtimeClassName",
        "spec.members[0].model.uri",
        "spec.members[0].model.credentialsSecret",
    ]
    assert "allowOverrides" in str(caught.value)
    check_allowed(reaching, allow_overrides=True)


def test_what_only_sizes_and_places_pods_is_allowed_to_all() -> None:
    placed = {
        "resources": {"requests": {"cpu": "2"}},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
    }
    check_allowed(ensemble("a", podTemplate={"worker": placed, "gateway": placed}), allow_overrides=False)


def test_every_part_of_a_pod_template_is_refused_or_places_the_pod() -> None:
    places = {"resources", "node_selector", "tolerations", "affinity"}
    assert {field.name for field in dataclasses.fields(PodOverrides)} == {*REACHING, *places}


def test_label_files_are_refused_in_any_case() -> None:
    output = {"name": "y", "datatype": "FP32", "shape": [2], "labels": "http://169.254.169.254/secret"}
    with pytest.raises(InvalidSpec, match="list the class names"):
        check_allowed(ensemble("a", inputs=False, output=output), allow_overrides=True)


def test_what_is_not_done_yet_is_said() -> None:
    scaled = ensemble("a", devices={"resource": "nvidia.com/gpu"}, autoscaling={"min": 3, "max": 8})
    assert "3 devices are held" in remarks(scaled)
    assert remarks(ensemble("a")) == ""
