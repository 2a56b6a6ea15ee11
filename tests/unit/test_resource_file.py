"""Resource files: what is read, what is made absolute, and what is said of files that are none."""

import hashlib
from pathlib import Path

import pytest

from ensemble_operator.api import InvalidSpec
from ensemble_operator.resource_file import (
    MAX_RESOURCE_BYTES,
    ResourceUnreadable,
    absolute_uri,
    load,
    read_labels,
    with_real_digest,
)

RESOURCE = """
apiVersion: ensemble-operator.io/v1alpha1
kind: InferenceEnsemble
metadata: {name: one}
spec:
  members:
  - name: a
    model: {uri: "file:models/a%20b.pt2"}
  input: {name: x, datatype: FP32, shape: [4]}
  output: {name: y, datatype: FP32, shape: [2], labels: "file:labels.txt"}
"""


@pytest.mark.parametrize(
    ("uri", "absolute"),
    [
        ("file:models/a.pt2", "file:///folder/models/a.pt2"),
        ("file:../a.pt2", "file:///folder/../a.pt2"),
        ("file:///abs/a.pt2", "file:///abs/a.pt2"),
        ("file://localhost/abs/a.pt2", "file:///abs/a.pt2"),
        ("file:a%20b.pt2", "file:///folder/a%20b.pt2"),
        ("models/a.pt2", "file:///folder/models/a.pt2"),
        ("/abs/a b.pt2", "file:///abs/a%20b.pt2"),
        ("https://host/a.pt2", "https://host/a.pt2"),
        ("s3://bucket/a.pt2", "s3://bucket/a.pt2"),
        ("file://elsewhere/a.pt2", "file://elsewhere/a.pt2"),
    ],
)
def test_absolute_uri(uri: str, absolute: str) -> None:
    assert absolute_uri(uri, Path("/folder")) == absolute


def test_load_resolves_against_the_file_and_not_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(RESOURCE)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a b.pt2").write_bytes(b"weights")
    ensemble = load(tmp_path / "e.yaml")
    member = ensemble.spec.members[0]
    assert member.model.uri == (tmp_path / "models" / "a b.pt2").as_uri()
    assert read_labels(ensemble) == {"y": ("cat", "dog")}
    assert with_real_digest(member).model.sha256 == hashlib.sha256(b"weights").hexdigest()


def test_a_model_that_is_not_there_keeps_its_declared_digest(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(RESOURCE)
    member = load(tmp_path / "e.yaml").spec.members[0]
    assert with_real_digest(member) == member


def test_labels_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(RESOURCE)
    with pytest.raises(ResourceUnreadable, match=r"^labels of output 'y' \(file://.*labels.txt\): .*No such file"):
        read_labels(load(tmp_path / "e.yaml"))


def test_files_that_are_no_resource(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"PK\x03\x04\xff\xff")
    (tmp_path / "huge").write_bytes(b"#" * (MAX_RESOURCE_BYTES + 1))
    for name, message in [
        ("none.yaml", "no such file; name the YAML file of an InferenceEnsemble"),
        (".", "is a folder; name the YAML file in it"),
        ("binary", "is not text in UTF-8 (byte 4); is it a model file?"),
        ("huge", f"is over {MAX_RESOURCE_BYTES} bytes; is it the YAML file of an ensemble?"),
    ]:
        with pytest.raises(ResourceUnreadable) as caught:
            load(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_a_file_that_is_no_resource_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("kind: Pod")
    with pytest.raises(InvalidSpec, match=str(tmp_path / "e.yaml")):
        load(tmp_path / "e.yaml")
