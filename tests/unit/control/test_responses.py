"""Answers of the API server as domain errors, with messages that say what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ensemble_operator.control.errors import (
    ClusterError,
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    NamespaceTerminating,
    NotFound,
    Refused,
    Unauthorized,
    Unavailable,
)
from ensemble_operator.control.kinds import ENSEMBLE, POD, STATEFUL_SET
from ensemble_operator.control.responses import Call, error_of

CALL = Call("patch", STATEFUL_SET, "vision", "imagenet-worker")
RBAC = (
    'statefulsets.apps "imagenet-worker" is forbidden: User "system:serviceaccount:a:b" cannot patch resource'
    ' "statefulsets" in API group "apps" in the namespace "vision"'
)


def status(message: str, **parts: Any) -> bytes:
    return json.dumps({"kind": "Status", "message": message, **parts}).encode()


@pytest.mark.parametrize(
    ("code", "body", "kind"),
    [
        (400, status("bad"), Invalid),
        (401, status("who"), Unauthorized),
        (403, status(RBAC, reason="Forbidden"), Forbidden),
        (403, status("exceeded quota: gpus", reason="Forbidden"), Refused),
        (403, status("x", details={"causes": [{"reason": "NamespaceTerminating"}]}), NamespaceTerminating),
        (404, status("no"), NotFound),
        (409, status("other version"), Conflict),
        (410, status("too old"), Expired),
        (422, status("spec.replicas: Invalid value"), Invalid),
        (429, status("slow down"), Unavailable),
        (500, status("etcdserver: request timed out"), Unavailable),
        (500, status("failed to create typed patch object (a/b): .dta: field not declared in schema"), Invalid),
        (500, status("failed to convert new object (a/b; apps/v1, Kind=StatefulSet) to proper version"), Invalid),
        (500, status('Internal error occurred: failed calling webhook "x.y": connection refused'), Refused),
        (502, b"<html>proxy</html>", Unavailable),
        (503, b"", Unavailable),
        (503, b"\xff\xfe", Unavailable),
        (500, b'["no", "status"]', Unavailable),
    ],
)
def test_codes(code: int, body: bytes, kind: type[ClusterError]) -> None:
    error = error_of(CALL, code, body)
    assert type(error) is kind
    assert "statefulsets" in str(error)


def test_a_missing_rule_is_written_as_it_must_be_added() -> None:
    text = str(error_of(CALL, 403, status(RBAC)))
    assert "may not patch statefulsets in namespace 'vision'" in text
    assert '{apiGroups: ["apps"], resources: ["statefulsets"], verbs: ["patch"]}' in text


def test_a_subresource_and_the_whole_cluster_are_named() -> None:
    refusal = status('User "x" cannot patch resource "inferenceensembles/status" in API group "ensemble-operator.io"')
    text = str(error_of(Call("patch", ENSEMBLE, "a", "b", "status"), 403, refusal))
    assert 'resources: ["inferenceensembles/status"]' in text
    refusal = status('User "x" cannot watch resource "pods" in API group "" at the cluster scope')
    assert "in the whole cluster" in str(error_of(Call("watch", POD), 403, refusal))


def test_a_long_answer_is_cut() -> None:
    assert len(str(error_of(CALL, 422, status("x" * 100_000)))) < 3_000


def test_the_time_to_wait_is_kept() -> None:
    error = error_of(CALL, 429, status("later"), 7.0)
    assert isinstance(error, Unavailable)
    assert error.retry_after_s == 7.0
