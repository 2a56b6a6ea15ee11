"""What the documents say of the cluster is so: values, conditions and reasons, alerts, manifests, commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from charts.generate import CHART, ROOT
from charts.values import values

from ensemble_operator.api import parse
from ensemble_operator.control import conditions, status
from tests.chart.commands import JOURNEY, LEFT_OUT, blocks, inline

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
CONTROL = ROOT / "operator/ensemble_operator/control"
# Reasons of conditions that are as they should be, or were not looked at: nobody looks them up.
WELL = {"Accepted", "DevicesAcquired", "Profiled", "Planned", "Ready", "AsWanted", "Done", "Rolling", "NotYet"}


def table(document: str, heading: str) -> Iterator[tuple[str, ...]]:
    """The rows of the table of a document whose first column has this heading."""
    text = (ROOT / "docs" / document).read_text()
    body = re.search(rf"^\| {heading} \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert body is not None, heading
    for line in body[1].splitlines():
        yield tuple(cell.strip() for cell in line.strip("|").split(" | "))


def known_keys() -> set[str]:
    return {".".join(value.path) for value in values(json.loads((CHART / "values.schema.json").read_text()))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_values_that_are_set_exist(document: str) -> None:
    text = (ROOT / "docs" / document).read_text()
    given = [*re.findall(r"--set (\S+)", text), *(cell for cell in re.findall(r"`(\S+=\S+)`", text) if "." in cell)]
    named = {pair.split("=")[0].partition("[")[0] for one in given for pair in one.split(",")}
    named |= set(re.findall(r"`((?:metrics|rbac|images|admissionPolicies)\.[a-zA-Z.]+)`", text))
    assert named <= known_keys() | {"KEY", "TORCH"}, named - known_keys()


def said_in_code() -> set[str]:
    """Every reason of a condition that the operator may give."""
    found: set[str] = {treatment.reason for treatment in conditions.TABLE.values()}
    for file in CONTROL.glob("*.py"):
        text = file.read_text()
        for said in re.findall(r"\.say\(.*?\)$", text, re.MULTILINE | re.DOTALL):
            found |= set(re.findall(r'reason="(\w+)"', said))
        for line in re.findall(r"^ +reason = .*$", text, re.MULTILINE):
            found |= set(re.findall(r'"(\w+)"', line)) if file.stem in ("report", "planstage") else set()
    return found | {status.ACQUIRE_TIMEOUT, status.NO_DEVICE_VISIBLE, status.PODS_NOT_CREATED}


def test_every_reason_is_explained_and_no_other() -> None:
    rows = list(table("troubleshooting.md", "condition"))
    explained = {row[1] for row in rows}
    assert explained == said_in_code() - WELL
    assert {row[0] for row in rows} == set(conditions.TYPES)


def test_every_alert_is_explained_and_no_other() -> None:
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    assert {row[0] for row in table("operating.md", "alert")} == alerts


def test_the_first_ensemble_is_valid() -> None:
    documents = list(yaml.safe_load_all((ROOT / "examples/digits/cluster.yaml").read_text()))
    [resource] = [document for document in documents if document["kind"] == "InferenceEnsemble"]
    assert len(parse(resource).spec.members) == 4
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    images = [
        container["image"]
        for document in documents
        if document["kind"] == "Deployment"
        for container in document["spec"]["template"]["spec"]["containers"]
    ]
    assert images == [f"localhost/gateway:{version}"]


def test_every_command_is_run() -> None:
    """By the journey of tests/cluster/test_documents.py."""
    sections = [(block.document, block.section) for document in DOCUMENTS for block in blocks(document)]
    assert set(JOURNEY) <= set(sections)
    for block in (block for document in DOCUMENTS for block in blocks(document)):
        if (block.document, block.section) not in JOURNEY:
            alone = [command for command in block.commands if not command.startswith(tuple(LEFT_OUT))]
            assert not alone, f"{block.document}: no test runs {alone}: see tests/chart/commands.py"


def test_what_no_test_runs_is_still_there() -> None:
    written = [command for document in DOCUMENTS for block in blocks(document) for command in block.commands]
    for beginning in LEFT_OUT:
        assert any(command.startswith(beginning) for command in written), beginning


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_command_to_type_is_in_a_block(document: Path) -> None:
    assert not list(inline(document)), "what no test would run"


def test_what_docker_is_told_to_build_is_in_the_dockerfile() -> None:
    written = (ROOT / "Dockerfile").read_text()
    stages, arguments = (set(re.findall(p, written, re.MULTILINE)) for p in (r"^FROM .* AS (\S+)$", r"^ARG (\w+)"))
    text = (ROOT / "docs/install.md").read_text()
    assert {"operator", "gateway", "worker"} <= stages
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= arguments
