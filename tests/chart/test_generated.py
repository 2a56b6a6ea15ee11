"""What the chart repeats is what its sources say, and what dashboards and alerts ask for exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx.reference
import pytest
import yaml
from charts.generate import CHART, ROOT, generated
from charts.values import values

from ensemble_gateway.exposition import exposition
from ensemble_gateway.metrics import Gauges, Metrics
from ensemble_gateway.request import Model
from ensemble_operator.control import conditions
from ensemble_operator.control.conditions import Condition
from ensemble_operator.control.metrics import Instruments, Sources
from ensemble_operator.control.status import phase_of
from ensemble_operator.control.workqueue import MAX_BACKOFF_S

DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(("path", "content"), list(generated()), ids=lambda part: getattr(part, "name", ""))
def test_generated_files_are_up_to_date(path: Path, content: bytes) -> None:
    assert path.read_bytes() == content, f"{path.relative_to(ROOT)}: run 'make chart'"


def leaves(values_file: Any, path: tuple[str, ...], groups: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    for key, value in values_file.items():
        here = (*path, key)
        if here in groups:
            yield from leaves(value, here, groups)
        else:
            yield here


def test_values_and_schema_have_the_same_keys_and_each_is_described() -> None:
    declared = list(values(json.loads((CHART / "values.schema.json").read_text())))
    written = yaml.safe_load((CHART / "values.yaml").read_text())
    groups = {value.path for value in declared if value.is_group}
    assert sorted(leaves(written, (), groups)) == sorted(value.path for value in declared if not value.is_group)
    assert all(value.description.endswith(".") for value in declared)


def test_the_network_of_helm_test_doubles() -> None:
    session = onnx.reference.ReferenceEvaluator(str(CHART / "files/tiny.onnx"))
    row = numpy.asarray([[1, 2, 3, 4]], dtype=numpy.float32)
    [doubled] = session.run(None, {"numbers": row})
    assert numpy.asarray(doubled).tolist() == [[2, 4, 6, 8]]


# What Prometheus itself says of whom it has asked.
TARGET_LABELS = {"namespace", "pod", "service", "job", "instance"}


def exposed() -> dict[str, set[str]]:
    """The labels of every metric that a gateway or the operator has, and of the parts of histograms."""
    found: dict[str, set[str]] = {}
    for page in (gateways_page(), operators_page()):
        found |= {name: set() for name in re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE)}
        for name, inside in re.findall(r"^([a-z]\w*)(\{.*\})? ", page, re.MULTILINE):
            found.setdefault(name, set()).update(re.findall(r"(\w+)=", inside))
    return found


def gateways_page() -> str:
    gauges = Gauges(int, int, int, lambda _: 0, lambda _: 0)
    models = [Model("e", "1", (), (), {}), Model("e.m", "1", (), (), {}, member=0)]
    return exposition(Metrics(models, gauges))


def operators_page() -> str:
    instruments = Instruments(0)
    instruments.reconciled("failed", 0.1, "Forbidden")
    return instruments.exposition(
        Sources(lambda: {("get", "secrets", 200): 1}, lambda: {"pods": 1}, lambda: [{}], int, float, bool)
    )


def asked_for() -> dict[str, set[str]]:
    """The metrics that each file names."""
    files = [CHART / "files/dashboard.json", CHART / "files/alerts.yaml", ROOT / "docs/operating.md"]
    pattern = r"\b(?:nv_inference|ensemble)_[a-z_]+\b"
    own = {"ensemble_operator", "ensemble_operator_io_ensemble", "ensemble_worker"}
    return {file.name: set(re.findall(pattern, file.read_text())) - own for file in files}


def test_dashboards_alerts_and_documents_name_metrics_that_exist() -> None:
    known = exposed()
    for file, names in asked_for().items():
        assert names, file
        assert names <= known.keys(), (file, names - known.keys())


def expressions() -> Iterator[str]:
    """Every expression of the dashboard and of the alerts."""
    for panel in json.loads((CHART / "files/dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", list(expressions()))
def test_labels_that_are_asked_for_exist(expression: str) -> None:
    known = exposed()
    named = [known[name] for name in re.findall(r"\b(?:nv_inference|ensemble)_\w+", expression)]
    by = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(", ")}
    assert by <= TARGET_LABELS.union(*named)
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)[!=]", inside)) <= TARGET_LABELS | known[name]


def test_one_ensemble_that_always_fails_is_told() -> None:
    """It is tried again once in the longest back-off, and the trying takes as long as that at most."""
    [written] = [one for one in expressions() if "reconcile_failures" in one and ">" in one]
    assert float(written.rpartition(">")[2]) < 1 / (2 * MAX_BACKOFF_S)


def test_every_phase_but_that_of_a_ready_ensemble_is_told() -> None:
    [written] = [one for one in expressions() if 'phase!="' in one]
    well = dict.fromkeys(conditions.TYPES, Condition(conditions.TRUE, "", ""))
    well |= dict.fromkeys(conditions.ABNORMAL, Condition(conditions.FALSE, "", ""))
    assert re.findall(r'phase!="(\w+)"', written) == [phase_of(well)]


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert chart["version"] == chart["appVersion"] == project[1]
    assert f"ARG VERSION={project[1]}\n" in DOCKERFILE


def test_the_label_of_the_base_names_the_base_that_is_built_on() -> None:
    default, *stages = DOCKERFILE.split("\nFROM ")
    assert re.search(r"^ARG BASE=\S+$", default, re.MULTILINE)
    [base] = [stage for stage in stages if stage.startswith("${BASE} AS base\n")]
    assert "\nARG BASE\n" in base
    assert 'org.opencontainers.image.base.name="${BASE}"\n' in base


def test_no_image_checks_its_own_health() -> None:
    """Probes are the pod's: an image's own check is another process every few seconds that nobody asks."""
    assert "HEALTHCHECK" not in DOCKERFILE


def test_the_images_have_the_names_that_the_chart_expects() -> None:
    stages = re.findall(r"^FROM base AS (\w+)$", DOCKERFILE, re.MULTILINE)
    images = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    assert sorted(stages) == sorted(image["repository"] for image in images.values() if isinstance(image, dict))


def test_the_worker_image_has_the_torch_of_the_constraints() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert f"ARG TORCH=torch=={pinned[1]}\n" in DOCKERFILE
