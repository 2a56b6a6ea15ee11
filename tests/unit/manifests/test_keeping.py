"""A pod template stays as it runs, over operator upgrades and edits, until the resource asks for another."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest

from ensemble_operator.api import parse
from ensemble_operator.manifests import TEMPLATE, UPGRADE, ChildSettings, Manifest, children, keep_running
from ensemble_operator.manifests.keeping import APPLIED
from ensemble_operator.manifests.pods import digest
from tests.unit.manifests.cases import inputs, resource

NEWER = ChildSettings(
    "example.com/worker:2.0", "example.com/gateway:2.0", "Always", "ensemble-system", "[::]", ("registry",)
)
WORKLOADS = [
    ("StatefulSet", "gpu-worker", "worker:1.0", "worker:2.0"),
    ("Deployment", "gpu-gateway", "gateway:1.0", "gateway:2.0"),
]


def made(
    settings: ChildSettings | None = None, annotations: dict[str, str] | None = None, **spec: Any
) -> dict[tuple[str, str], Manifest]:
    document = resource("gpu")
    document["metadata"]["annotations"] = annotations or {}
    document["spec"] = {**document["spec"], **spec}
    given = dataclasses.replace(inputs("gpu"), ensemble=parse(document))
    if settings is not None:
        given = dataclasses.replace(given, settings=settings)
    return {(m["kind"], m["metadata"]["name"]): m for m in children(given)}


def kept(settings: ChildSettings | None = None, **more: Any) -> dict[tuple[str, str], Manifest]:
    """What is applied on top of what runs since the first version."""
    running = made()
    return {
        key: keep_running(new, running[key])
        for key, new in made(settings, **more).items()
        if key[0] in ("StatefulSet", "Deployment")
    }


def image(workload: Manifest) -> str:
    return str(workload["spec"]["template"]["spec"]["containers"][0]["image"]).rpartition("/")[2]


def pull_secrets(workload: Manifest) -> list[str]:
    return [secret["name"] for secret in workload["spec"]["template"]["spec"].get("imagePullSecrets", [])]


@pytest.mark.parametrize(("kind", "name", "old", "new"), WORKLOADS)
def test_an_operator_upgrade_alone_changes_no_template(kind: str, name: str, old: str, new: str) -> None:
    before = made()[kind, name]
    assert image(made(NEWER)[kind, name]) == new
    assert kept(NEWER)[kind, name] == before


@pytest.mark.parametrize(("kind", "name", "old", "new"), WORKLOADS)
def test_the_annotation_upgrade_takes_the_new_images(kind: str, name: str, old: str, new: str) -> None:
    assert image(kept(NEWER, annotations={UPGRADE: "now"})[kind, name]) == new


def test_a_changed_pod_template_takes_the_new_image_of_its_component_only() -> None:
    found = kept(NEWER, podTemplate={"worker": {"labels": {"a": "b"}}})
    assert image(found["StatefulSet", "gpu-worker"]) == "worker:2.0"
    assert image(found["Deployment", "gpu-gateway"]) == "gateway:1.0"


def test_pull_secrets_are_kept_and_taken_anew_with_the_image() -> None:
    with_others = dataclasses.replace(NEWER, image_pull_secrets=("other",))
    worker = ("StatefulSet", "gpu-worker")
    assert pull_secrets(kept(NEWER, gateway={"timeout": "99s"})["Deployment", "gpu-gateway"]) == []
    asked = kept(NEWER, annotations={UPGRADE: "now"})[worker]
    assert pull_secrets(asked) == ["registry"]
    assert keep_running(made(with_others, annotations={UPGRADE: "now"})[worker], asked) == asked
    member = {"name": "a", "model": {"uri": "pvc://models/a.pt2"}}
    changed = made(with_others, annotations={UPGRADE: "now"}, members=[member])[worker]
    assert pull_secrets(changed) == ["other"]
    assert pull_secrets(keep_running(changed, asked)) == ["registry"]


def test_a_template_that_must_change_otherwise_keeps_its_image() -> None:
    member = {"name": "a", "model": {"uri": "pvc://models/a.pt2"}}
    found = kept(NEWER, members=[member], gateway={"timeout": "99s"})
    worker, gateway = found["StatefulSet", "gpu-worker"], found["Deployment", "gpu-gateway"]
    assert (image(worker), image(gateway)) == ("worker:1.0", "gateway:1.0")
    assert "claim-0" in [volume["name"] for volume in worker["spec"]["template"]["spec"]["volumes"]]
    assert gateway["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 109
    for workload in (worker, gateway):
        template = copy.deepcopy(workload["spec"]["template"])
        assert template["metadata"]["annotations"].pop(TEMPLATE) == digest(template)


def test_what_was_kept_is_kept_again() -> None:
    first = kept(NEWER, gateway={"timeout": "99s"})["Deployment", "gpu-gateway"]
    newest = dataclasses.replace(NEWER, gateway_image="example.com/gateway:3.0")
    again = keep_running(made(newest, gateway={"timeout": "99s"})["Deployment", "gpu-gateway"], first)
    assert again == first


def test_an_edited_template_is_set_right() -> None:
    live = copy.deepcopy(made()["StatefulSet", "gpu-worker"])
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "example.com/edited"
    assert keep_running(made()["StatefulSet", "gpu-worker"], live) == made()["StatefulSet", "gpu-worker"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"metadata":{"annotations":[]}}', '{"spec":{}}', '{"spec":{"containers":[]}}', "null"]
)
def test_a_damaged_record_is_made_anew(text: str) -> None:
    live = copy.deepcopy(made()["StatefulSet", "gpu-worker"])
    live["metadata"]["annotations"][APPLIED] = text
    assert image(keep_running(made(NEWER)["StatefulSet", "gpu-worker"], live)) == "worker:2.0"


def test_an_edited_record_is_made_anew() -> None:
    live = copy.deepcopy(made()["StatefulSet", "gpu-worker"])
    annotations = live["metadata"]["annotations"]
    annotations[APPLIED] = annotations[APPLIED].replace("example.com/worker:1.0", "example.com/edited")
    assert image(keep_running(made(NEWER)["StatefulSet", "gpu-worker"], live)) == "worker:2.0"


def test_without_a_live_object_everything_is_new() -> None:
    new = made(NEWER)["StatefulSet", "gpu-worker"]
    assert keep_running(new, None) == new


def test_children_keep_what_they_are_told_runs() -> None:
    running = made()
    newer = dataclasses.replace(inputs("gpu"), settings=NEWER)
    found = {(m["kind"], m["metadata"]["name"]): m for m in children(newer, running)}
    assert found["StatefulSet", "gpu-worker"] == running["StatefulSet", "gpu-worker"]
