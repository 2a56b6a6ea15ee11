"""Bad documents, each with the exact problems that its user reads. The API server refuses those in `SEEN`, too."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from ensemble_operator.api import InvalidSpec, parse
from tests.unit.test_api import MINIMAL

BASE: dict[str, Any] = copy.deepcopy(MINIMAL)
BASE["spec"] |= {
    "members": [
        {"name": "a", "model": {"uri": "file:///a.pt2"}},
        {"name": "b", "model": {"uri": "file:///b.pt2"}},
    ],
    "input": {"name": "x", "datatype": "FP32", "shape": [4]},
    "output": {"name": "y", "datatype": "FP32", "shape": [3]},
    "devices": {"count": 1},
}

GONE = object()
"""The value of a field that is taken out."""


def changed(*changes: tuple[str, object]) -> dict[str, Any]:
    """BASE with other values at dotted paths (numbers are indices; missing parents are made)."""
    document = copy.deepcopy(BASE)
    for path, value in changes:
        *parents, last = path.split(".")
        place: Any = document
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if value is GONE:
            del place[last]
        elif isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    return document


M1 = "spec.members.1"
TENSOR = {"name": "z", "datatype": "FP32", "shape": [4]}
LABEL = "a DNS-1123 label (lower-case letters, digits and -, not at the ends)"
URI = "a URI like file:///PATH, pvc://CLAIM/PATH, https://…, s3://…, gs://… or hf://…"
RULES = "mean, weightedMean, geometricMean, median, max, min, vote, weightedVote, none"
DATATYPES = "BOOL, UINT8, UINT16, UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, FP32, FP64, BF16"
MEASURED = {"batchSize": 8, "memory": "1Mi", "latency": "1ms"}


def profile(**changes: object) -> dict[str, object]:
    return {"measurements": [MEASURED | changes]}


# What the API server refuses, too.
SEEN: list[tuple[str, object, str]] = [
    (f"{M1}.weight", -1, "spec.members[1].weight: must be above 0, got -1"),
    (f"{M1}.weight", 0, "spec.members[1].weight: must be above 0, got 0"),
    (f"{M1}.weight", 1e7, "spec.members[1].weight: must be at most 1e+06, got 10000000.0"),
    (f"{M1}.weight", "1", "spec.members[1].weight: must be a number, got '1'"),
    (f"{M1}.weight", True, "spec.members[1].weight: must be a number, got true"),
    (
        f"{M1}.weight",
        2,
        (
            "spec.members[1].weight: must be 1 under the rule mean, got 2; weights count under weightedMean "
            "and weightedVote"
        ),
    ),
    (f"{M1}.name", GONE, "spec.members[1].name: is required"),
    (f"{M1}.name", "a", "spec.members[1]: name 'a' is already at spec.members[0]; each must be of its own"),
    (f"{M1}.name", "a.b", f"spec.members[1].name: must be {LABEL}, got 'a.b'"),
    (f"{M1}.name", "a\n", f"spec.members[1].name: must be {LABEL}, got 'a\\n'"),
    (f"{M1}.name", "x" * 64, f"spec.members[1].name: must be {LABEL} of 1 to 63 characters, got 64 characters"),
    (f"{M1}.model", GONE, "spec.members[1].model: is required"),
    (f"{M1}.model", "file:///a.pt2", "spec.members[1].model: must be a mapping, got 'file:///a.pt2'"),
    (f"{M1}.model.uri", "/a.pt2", f"spec.members[1].model.uri: must be {URI}, got '/a.pt2'"),
    (f"{M1}.model.uri", "ftp://h/a.pt2", f"spec.members[1].model.uri: must be {URI}, got 'ftp://h/a.pt2'"),
    (f"{M1}.model.sha256", "abc", "spec.members[1].model.sha256: must be a SHA-256 of 64 hex digits, got 'abc'"),
    (
        f"{M1}.model.version",
        1,
        (
            "spec.members[1].model.version: must be a version (letters, digits, ., _ and -), got 1; write "
            "it in quotes: '1'"
        ),
    ),
    (f"{M1}.format", "pt2", "spec.members[1].format: must be one of torch-export, torchscript, onnx, got 'pt2'"),
    (
        f"{M1}.model.uri",
        "file:///a.bin",
        (
            "spec.members[1].format: is required: 'file:///a.bin' does not end in .pt2, .pt, .ts, .onnx, "
            "which would tell it"
        ),
    ),
    (
        f"{M1}.activation",
        "sofmax",
        "spec.members[1].activation: must be one of none, softmax, sigmoid, got 'sofmax'; did you mean 'softmax'?",
    ),
    (f"{M1}.weigth", 1, "spec.members[1].weigth: unknown field; did you mean 'weight'?"),
    (
        f"{M1}.profile",
        {"x": 1, **profile()},
        "spec.members[1].profile.x: unknown field; known here: measurements",
    ),
    (
        f"{M1}.profile",
        profile(latency=-1),
        _L := "spec.members[1].profile.measurements[0].latency: must be a duration like 30s, 1m30s or 5ms, got -1",
    ),
    (f"{M1}.profile", profile(latency="-1ms"), _L.replace("got -1", "got '-1ms'")),
    (f"{M1}.profile", profile(memory=-1), "spec.members[1].profile.measurements[0].memory: must be 0 to 64Ti, got -1"),
    (
        f"{M1}.profile",
        {"measurements": [MEASURED, MEASURED]},
        (
            "spec.members[1].profile.measurements[1]: deviceClass '*' and batchSize 8 is already at "
            "spec.members[1].profile.measurements[0]; each must be of its own"
        ),
    ),
    ("spec.members", [], "spec.members: must have 1 to 64 items, got 0"),
    ("spec.members", {}, "spec.members: must be a list, got a mapping"),
    ("spec.members", GONE, "spec.members: is required"),
    ("spec.input.datatype", "BYTES", f"spec.input.datatype: must be one of {DATATYPES}, got 'BYTES'"),
    ("spec.input.shape", [-1, 4], "spec.input.shape[0]: must be 1 to 2147483648, got -1"),
    ("spec.input.shape", "4", "spec.input.shape: must be a list, got '4'"),
    ("spec.input.shape", [1] * 17, "spec.input.shape: must have 0 to 16 items, got 17"),
    ("spec.output.name", GONE, "spec.output.name: is required"),
    ("spec.output", [TENSOR, {"name": "q"}], "spec.output[1].datatype: is required\nspec.output[1].shape: is required"),
    ("spec.output", 5, "spec.output: must be a mapping, or a list of mappings, got 5"),
    (
        "spec.combine.rule",
        "median_",
        f"spec.combine.rule: must be one of {RULES}, got 'median_'; did you mean 'median'?",
    ),
    ("spec.combine.quorum", 3, "spec.combine.quorum: must be 1 to 2, the number of members, got 3"),
    ("spec.combine.quorum", 0, "spec.combine.quorum: must be 1 to 64, got 0"),
    ("spec.combine.quorum", 1.5, "spec.combine.quorum: must be a whole number, got 1.5"),
    ("spec.devices.count", 0, "spec.devices.count: must be 1 to 4096, got 0"),
    (
        "spec.autoscaling",
        {"max": 4},
        "spec.devices.count: cannot be combined with spec.autoscaling: remove one of the two",
    ),
    (
        "spec.devices",
        {"count": 1, "resource": "cpu", "cores": "1"},
        "spec.devices.memory: is required with resource cpu: it says how large a device is",
    ),
    (
        "spec.devices.cores",
        "1",
        "spec.devices.cores: is only for resource cpu; of a GPU worker's pod, podTemplate.worker.resources says it",
    ),
    (
        "spec.devices",
        {"count": 1, "resource": "amd.com/gpu", "deviceClass": "gpu.amd.com"},
        "spec.devices.resource: cannot be combined with deviceClass: remove one",
    ),
    ("spec.devices.memoryHeadroom", 0.1, "spec.devices.memoryHeadroom: must be a percentage like 10%, got 0.1"),
    ("spec.devices.memoryHeadroom", "100%", "spec.devices.memoryHeadroom: must be under 100%, got '100%'"),
    ("spec.devices.acquireTimeout", "0s", "spec.devices.acquireTimeout: must be 1s to 168h, got '0s'"),
    (
        "spec.devices.nodeSelector",
        {"a": 1},
        (
            "spec.devices.nodeSelector.a: must be a label's value (letters, digits, -, _ and .), got 1; "
            "write it in quotes: '1'"
        ),
    ),
    ("spec.extraDevices", [{}], "spec.extraDevices[0].count: is required"),
    ("spec.batching.sizes", [1, 8, 8], "spec.batching.sizes[2]: must be above the size before it (8), got 8"),
    ("spec.batching.sizes", [8, 1], "spec.batching.sizes[1]: must be above the size before it (8), got 1"),
    ("spec.batching.sizes", [0, 1], "spec.batching.sizes[0]: must be 1 to 65536, got 0"),
    ("spec.batching.sizes", [65537], "spec.batching.sizes[0]: must be 1 to 65536, got 65537"),
    ("spec.batching.sizes", [], "spec.batching.sizes: must have 1 to 32 items, got 0"),
    ("spec.batching.maxDelay", "5", "spec.batching.maxDelay: must be a duration like 30s, 1m30s or 5ms, got '5'"),
    ("spec.batching.maxDelay", "2m", "spec.batching.maxDelay: must be 0s to 1m, got '2m'"),
    (
        "spec.batching.maxQueueBytes",
        "1KB",
        "spec.batching.maxQueueBytes: must be a quantity like 512Mi, 2G or 250m, got '1KB'",
    ),
    ("spec.batching.maxQueueBytes", 1, "spec.batching.maxQueueBytes: must be 1Mi to 16Ti, got 1"),
    ("spec.batching.max_delay", "1s", "spec.batching.max_delay: unknown field; did you mean 'maxDelay'?"),
    (
        "spec.planning.objective",
        "devices",
        "spec.planning.targetThroughput: must be above 0 with objective devices: it is what the devices shall reach",
    ),
    ("spec.planning.seed", -1, "spec.planning.seed: must be 0 to 2147483647, got -1"),
    ("spec.gateway.timeout", "0s", "spec.gateway.timeout: must be 1ms to 24h, got '0s'"),
    ("spec.transport.encryption", "tls", "spec.transport.encryption: must be one of curve, none, got 'tls'"),
    ("spec.rollout", False, "spec.rollout: must be one of Online, Pause, got false"),
    (
        "spec.podTemplate.worker.env",
        [{"value": "b"}],
        "spec.podTemplate.worker.env[0].name: must be a string, got nothing",
    ),
    ("spec.podTemplate.worker.affinity", [], "spec.podTemplate.worker.affinity: must be a mapping, got a list"),
    ("spec.podTemplates", {}, "spec.podTemplates: unknown field; did you mean 'podTemplate'?"),
    (
        "metadata.name",
        "Tiny",
        (
            "metadata.name: must be a DNS-1123 label that starts with a letter (lower-case letters, digits "
            "and -), got 'Tiny'"
        ),
    ),
    ("spec", GONE, "spec: is required"),
]

# What only the parser sees: the types of the CRD do not reach so far, or JSON cannot say it.
UNSEEN: list[tuple[str, object, str]] = [
    ("apiVersion", "v1", "apiVersion: must be 'ensemble-operator.io/v1alpha1', got 'v1'"),
    ("kind", GONE, "kind: is required; it must be 'InferenceEnsemble'"),
    ("metadata", GONE, "metadata.name: is required"),
    ("metadata", [], "metadata: must be a mapping, got a list"),
    ("metadata.name", GONE, "metadata.name: is required"),
    ("metadata.namespace", "A_b", f"metadata.namespace: must be {LABEL}, got 'A_b'"),
    ("specs", {}, "specs: unknown field; did you mean 'spec'?"),
    (f"{M1}.weight", math.nan, "spec.members[1].weight: must be a number, got nan"),
    (f"{M1}.weight", math.inf, "spec.members[1].weight: must be at most 1e+06, got inf"),
    (f"{M1}.weight", 10**400, "spec.members[1].weight: must be at most 1e+06, got a number of more than 60 digits"),
    (f"{M1}.profile", profile(latency=math.nan), _L.replace("got -1", "got nan")),
    (
        f"{M1}.profile",
        profile(memory=math.nan),
        "spec.members[1].profile.measurements[0].memory: must be a quantity like 512Mi, 2G or 250m, got nan",
    ),
    (
        f"{M1}.model.uri",
        "s3://user:secret@bucket/a.pt2",
        (
            "spec.members[1].model.uri: must not hold a user name or password: put them into a Secret and name it in "
            "credentialsSecret"
        ),
    ),
    (
        f"{M1}.model.uri",
        "file://host/a.pt2",
        "spec.members[1].model.uri: must not name a host; write file:///host/a.pt2",
    ),
    (
        f"{M1}.model.uri",
        "pvc://claim/../a.pt2",
        "spec.members[1].model.uri: must stay inside its claim, without '..', got 'pvc://claim/../a.pt2'",
    ),
    (f"{M1}.model.uri", "pvc://A/a.pt2", "spec.members[1].model.uri: must name a claim by a DNS-1123 name, got 'A'"),
    (
        f"{M1}.model.uri",
        "s3://a.pt2",
        "spec.members[1].model.uri: must name a host or bucket and a path there, got 's3://a.pt2'",
    ),
    (
        f"{M1}.model.uri",
        "https://[a/b.pt2",
        f"spec.members[1].model.uri: must be {URI}, got 'https://[a/b.pt2': Invalid IPv6 URL",
    ),
    ("spec.input.shape", [2.0], "spec.input.shape[0]: must be a whole number, got 2.0"),
    (
        "spec.input.shape",
        [2**31, 2],
        (
            "spec.input.shape: must make rows of at most 2147483648 bytes, got 17179869184\n"
            "spec.batching.maxQueueBytes: must hold a row, which has 17179869184 bytes of input, got 536870912 bytes"
        ),
    ),
    ("spec.output", [TENSOR, TENSOR], "spec.output[1]: name 'z' is already at spec.output[0]; each must be of its own"),
    (
        "spec.output.labels",
        ["cat"],
        "spec.output.labels: must have one name for each class of the output (its last axis has 3), got 1",
    ),
    ("spec.output.labels", ["a", 5, "c"], "spec.output.labels[1]: must be a string, got 5; write it in quotes: '5'"),
    (
        "spec.output.labels",
        {"cat": 0},
        "spec.output.labels: must be a list of names, or the URI of a file with one on each line, got a mapping",
    ),
    (
        "spec.output.datatype",
        "INT64",
        (
            "spec.combine.rule: the rule mean needs floating outputs, and 'y' is INT64; integers combine "
            "under max, min, none"
        ),
    ),
    (
        "spec.podTemplate.worker.affinity",
        {1: 2},
        "spec.podTemplate.worker.affinity: must be a mapping with strings as keys, got a mapping",
    ),
    ("spec.podTemplate.worker.affinity", {"a": {3}}, "spec.podTemplate.worker.affinity.a: must be JSON, got a set"),
]


CASES = SEEN + UNSEEN


@pytest.mark.parametrize(
    ("path", "value", "problems"), CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)]
)
def test_a_bad_value(path: str, value: object, problems: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse(changed((path, value)))
    assert str(caught.value) == problems
