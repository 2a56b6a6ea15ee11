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
from ensemble_operator.control.metrics import NAMES


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


def exposed() -> set[str]:
    """Every metric that a gateway or the operator has, and the parts of histograms, as Prometheus stores them."""
    gauges = Gauges(int, int, int, lambda _: 0, lambda _: 0)
    models = [Model("e", "1", (), (), {}), Model("e.m", "1", (), (), {}, member=0)]
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exposition(Metrics(models, gauges)), re.MULTILINE))
    kinds |= {name: kind for name, (kind, _) in NAMES.items()}
    parts = {f"{name}{part}" for name in kinds if kinds[name] == "histogram" for part in ("_bucket", "_sum", "_count")}
    return {*kinds, *parts}


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
        assert names <= known, (file, names - known)


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert chart["version"] == chart["appVersion"] == project[1]


def test_the_images_have_the_names_that_the_chart_expects() -> None:
    stages = re.findall(r"^FROM base AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    images = yaml.safe_load((CHART / "values.yaml").read_text())["images"]
    assert sorted(stages) == sorted(image["repository"] for image in images.values() if isinstance(image, dict))


def test_the_worker_image_has_the_torch_of_the_constraints() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert f"ARG TORCH=torch=={pinned[1]}\n" in (ROOT / "Dockerfile").read_text()
