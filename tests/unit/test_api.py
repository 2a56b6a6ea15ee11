"""Good documents become complete, typed values; and what depends on what the document says, set or not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.api import (
    Autoscaling,
    Batching,
    Combine,
    Devices,
    Gateway,
    InferenceEnsemble,
    Measurement,
    ModelRef,
    Planning,
    Transport,
    cluster_only,
    ensemble_digest,
    member_digest,
    parse,
)

MINIMAL: dict[str, Any] = {
    "apiVersion": "ensemble-operator.io/v1alpha1",
    "kind": "InferenceEnsemble",
    "metadata": {"name": "tiny"},
    "spec": {"members": [{"name": "a", "model": {"uri": "file:///a.pt2"}}]},
}
FULL: dict[str, Any] = {
    "apiVersion": "ensemble-operator.io/v1alpha1",
    "kind": "InferenceEnsemble",
    "metadata": {
        "name": "imagenet",
        "namespace": "vision",
        "uid": "0b5c",
        "generation": 3,
        "labels": {"example.com/team": "a"},
        "annotations": {"note": "two\nlines\n"},
    },
    "spec": {
        "members": [
            {
                "name": "lite0",
                "model": {
                    "uri": "pvc://models/lite0.pt2",
                    "sha256": "AB" * 32,
                    "version": "2",
                    "credentialsSecret": "keys",
                },
                "format": "torch-export",
                "activation": "softmax",
                "weight": 2,
                "profile": {
                    "measurements": [
                        {"batchSize": 8, "memory": "512Mi", "latency": "9.5ms"},
                        {"deviceClass": "H100", "batchSize": 8, "memory": 1024, "latency": "1ms"},
                    ]
                },
            },
            {"name": "lite1", "model": {"uri": "https://models.example/lite1.ONNX?sig=a.b"}, "weight": 0.5},
        ],
        "input": [
            {"name": "image", "datatype": "UINT8", "shape": [3, 224, 224]},
            {"name": "age", "datatype": "FP32", "shape": []},
        ],
        "output": [
            {"name": "p", "datatype": "FP32", "shape": [2], "labels": ["cat", "dog"]},
            {"name": "q", "datatype": "FP16", "shape": [5], "labels": "labels.txt"},
            {"name": "r", "datatype": "BF16", "shape": [1]},
        ],
        "combine": {"rule": "weightedMean", "quorum": 1},
        "devices": {
            "resource": "cpu",
            "cores": "1500m",
            "memory": "4Gi",
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "cpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}],
            "memoryHeadroom": "12.5%",
            "acquireTimeout": "1h",
        },
        "extraDevices": [{"count": 2, "deviceClass": "gpu.nvidia.com"}],
        "autoscaling": {"min": 2, "max": 8, "targetUtilization": 0.5},
        "batching": {"sizes": [4, 32], "maxDelay": "2ms", "maxQueueBytes": "1Gi"},
        "planning": {
            "objective": "devices",
            "targetThroughput": 100,
            "strategy": "exact",
            "evaluate": "live",
            "maxIterations": 0,
            "maxNeighbours": 7,
            "seed": 5,
            "profileBudget": "90s",
        },
        "gateway": {"replicas": 3, "timeout": "5s", "serviceType": "LoadBalancer"},
        "transport": {"encryption": "none"},
        "rollout": "Pause",
        "podTemplate": {
            "worker": {"image": "w:1", "env": [{"name": "A", "value": "b"}], "affinity": {"nodeAffinity": {}}}
        },
    },
    "status": {"anything": ["goes"]},
}


def with_spec(**fields: object) -> dict[str, Any]:
    document = copy.deepcopy(MINIMAL)
    document["spec"] |= fields
    return document


def test_the_smallest_document_gets_every_default() -> None:
    ensemble = parse(MINIMAL)
    spec = ensemble.spec
    assert (ensemble.name, ensemble.namespace, ensemble.labels, ensemble.annotations) == ("tiny", "default", {}, {})
    member = spec.members[0]
    assert member.model == ModelRef("file:///a.pt2", "", "1", "")
    assert (member.format, member.activation, member.weight, member.profile) == ("torch-export", "none", 1.0, ())
    assert (spec.inputs, spec.outputs, spec.labels, spec.autoscaling, spec.extra_devices) == ((), (), {}, None, ())
    assert spec.combine == Combine("mean", quorum=1)
    assert spec.devices == Devices(1, "nvidia.com/gpu", "", None, None, {}, (), 0.1, 600.0)
    assert spec.batching == Batching((1, 8, 16, 32, 64, 128), 0.0, 512 << 20)
    assert spec.planning == Planning("throughput", 0.0, "greedy", "model", 10, 100, 0, 300.0)
    assert spec.gateway == Gateway(1, 30.0, "ClusterIP")
    assert (spec.transport, spec.rollout) == (Transport("curve"), "Online")
    assert spec.pod_template.worker == spec.pod_template.gateway
    assert (spec.pod_template.worker.image, spec.pod_template.worker.env) == ("", ())


def test_every_field_arrives() -> None:
    spec = parse(FULL).spec
    lite0, lite1 = spec.members
    assert lite0.model == ModelRef("pvc://models/lite0.pt2", "ab" * 32, "2", "keys")
    assert lite0.profile == (Measurement("", 8, 512 << 20, 0.0095), Measurement("H100", 8, 1024, 0.001))
    assert (lite0.weight, lite1.weight, lite1.format) == (2.0, 0.5, "onnx")
    assert spec.inputs == (TensorSpec("image", "UINT8", (3, 224, 224)), TensorSpec("age", "FP32", ()))
    assert [tensor.name for tensor in spec.outputs] == ["p", "q", "r"]
    assert spec.labels == {"p": ("cat", "dog"), "q": "labels.txt"}
    assert spec.combine == Combine("weightedMean", 1)
    toleration = {"key": "cpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}
    assert spec.devices == Devices(2, "cpu", "", 1.5, 4 << 30, {"pool": "cpu"}, (toleration,), 0.125, 3600.0)
    assert [(pool.count, pool.device_class) for pool in spec.extra_devices] == [(2, "gpu.nvidia.com")]
    assert spec.autoscaling == Autoscaling(2, 8, 0.5)
    assert spec.batching == Batching((4, 32), 0.002, 1 << 30)
    assert spec.planning == Planning("devices", 100.0, "exact", "live", 0, 7, 5, 90.0)
    assert spec.gateway == Gateway(3, 5.0, "LoadBalancer")
    assert (spec.transport, spec.rollout) == (Transport("none"), "Pause")
    assert spec.pod_template.worker.image == "w:1"
    assert spec.pod_template.worker.env == ({"name": "A", "value": "b"},)
    assert spec.pod_template.worker.affinity == {"nodeAffinity": {}}


def test_one_tensor_and_a_list_of_one_are_the_same() -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [4]}
    assert parse(with_spec(input=tensor, output=tensor)) == parse(with_spec(input=[tensor], output=[tensor]))


@pytest.mark.parametrize(
    ("uri", "format_"),
    [
        ("file:lite0.pt2", "torch-export"),
        ("file:///m/a.pt", "torchscript"),
        ("s3://bucket/a.ts", "torchscript"),
        ("hf://org/repo/a.onnx", "onnx"),
        ("https://x/a.PT2?v=1#top", "torch-export"),
    ],
)
def test_the_suffix_tells_the_format(uri: str, format_: str) -> None:
    assert parse(with_spec(members=[{"name": "a", "model": {"uri": uri}}])).spec.members[0].format == format_


def test_null_is_as_good_as_absent() -> None:
    assert parse(with_spec(combine=None, batching={"sizes": None}, autoscaling=None)) == parse(MINIMAL)


def test_the_parsed_value_is_frozen_pickled_and_apart_from_the_document() -> None:
    document = copy.deepcopy(FULL)
    ensemble = parse(document)
    document["spec"]["podTemplate"]["worker"]["affinity"]["nodeAffinity"]["changed"] = True
    assert ensemble == parse(FULL)
    assert pickle.loads(pickle.dumps(ensemble)) == ensemble
    with pytest.raises(AttributeError):
        ensemble.name = "other"  # type: ignore[misc]


def test_what_one_machine_sets_aside_and_what_waits_for_later_work() -> None:
    ensemble = parse(FULL)
    assert cluster_only(ensemble) == [
        "spec.autoscaling",
        "spec.devices.acquireTimeout",
        "spec.devices.cores",
        "spec.devices.memory",
        "spec.devices.nodeSelector",
        "spec.devices.resource",
        "spec.devices.tolerations",
        "spec.extraDevices",
        "spec.gateway.replicas",
        "spec.gateway.serviceType",
        "spec.members[0].model.credentialsSecret",
        "spec.podTemplate",
        "spec.transport",
    ]


def test_only_what_the_document_says_is_named() -> None:
    assert cluster_only(parse(MINIMAL)) == []
    headroom = parse(with_spec(devices={"memoryHeadroom": "20%"}, podTemplate={}, extraDevices=[]))
    assert cluster_only(headroom) == []


def member_with(**fields: object) -> InferenceEnsemble:
    model = {key: fields.pop(key) for key in ("uri", "sha256", "version") if key in fields}
    member = {"name": "a", "model": {"uri": "file:///a.pt2", **model}, **fields}
    return parse(with_spec(members=[member], combine={"rule": "weightedMean"}))


def test_the_digest_changes_with_what_answers() -> None:
    forms: list[dict[str, object]] = [
        {},
        {"uri": "file:///b.pt2"},
        {"sha256": "0" * 64},
        {"version": "2"},
        {"format": "onnx"},
        {"activation": "softmax"},
    ]
    digests = [member_digest(member_with(**form).spec.members[0]) for form in forms]
    assert len(set(digests)) == len(forms)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    renamed = member_with(
        name="b", weight=3, profile={"measurements": [{"batchSize": 1, "memory": 1, "latency": "1s"}]}
    )
    assert member_digest(renamed.spec.members[0]) == digests[0]
    assert member_digest(member_with(sha256="AB" * 32).spec.members[0]) == member_digest(
        member_with(sha256="ab" * 32).spec.members[0]
    )


def test_the_digest_of_an_ensemble_changes_with_its_answers_and_not_with_its_devices() -> None:
    assert ensemble_digest(member_with(weight=2)) != ensemble_digest(member_with())
    assert ensemble_digest(parse(MINIMAL)) != ensemble_digest(parse(with_spec(combine={"rule": "max"})))
    assert ensemble_digest(parse(MINIMAL)) == ensemble_digest(parse(with_spec(devices={"count": 9})))


def test_the_largest_ensemble() -> None:
    members = [{"name": f"m{index}", "model": {"uri": f"s3://bucket/m{index}.onnx"}} for index in range(64)]
    spec = parse(with_spec(members=members, devices={"count": 1000})).spec
    assert (len(spec.members), spec.combine.quorum, spec.devices.count) == (64, 64, 1000)
