"""Model files on this machine and in the cache: what is read in place, and what an error says."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from ensemble_contract.plan import ModelSource
from ensemble_worker import storage
from ensemble_worker.errors import ModelError, without_secrets


def _source(uri: str, sha256: str = "") -> ModelSource:
    return ModelSource("cat", "d", uri, "torch-export", sha256=sha256)


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_local_files_are_used_in_place(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a model.pt2"
    path.write_bytes(b"weights")
    uri = form.format(path) if form == "{}" else path.as_uri()
    digest = hashlib.sha256(b"weights").hexdigest()
    assert storage.fetch(_source(uri, digest.upper()), tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()


def test_a_digest_that_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"other")
    with pytest.raises(
        ModelError, match=f"its sha256 is {hashlib.sha256(b'other').hexdigest()}, declared is {'0' * 64}"
    ):
        storage.fetch(_source(str(path), "0" * 64), tmp_path)


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("/no/such/model.pt2", "there is no file /no/such/model.pt2"),
        ("file:///no/such/model.pt2", "there is no file"),
        ("file:///", "not a file"),
        ("pvc://shelf/cats/a%20model.pt2", "there is no file /models/shelf/cats/a model.pt2"),
        ("what://model.pt2", "what: is not a place"),
    ],
)
def test_what_cannot_be_had_is_said(tmp_path: Path, uri: str, cause: str) -> None:
    with pytest.raises(ModelError, match=cause) as caught:
        storage.fetch(_source(uri), tmp_path)
    assert str(caught.value).startswith("member 'cat' (")


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    """Dropbox's client is in none of our extras, so it is never installed."""
    with pytest.raises(ModelError, match=r"ensemble-operator\[storage\]"):
        storage.fetch(_source("dropbox://folder/model.pt2"), tmp_path)


def test_secrets_in_uris_are_not_shown() -> None:
    assert without_secrets("https://user:word@host:1/a/b.pt2?sig=key#x") == "https://host:1/a/b.pt2"
    assert without_secrets("/plain/path.pt2") == "/plain/path.pt2"
    assert "key" not in str(ModelError("m", "s3://b/k?sig=key", "gone"))


def test_progress_lines_are_few(caplog: pytest.LogCaptureFixture) -> None:
    report = storage.log_progress("cat")
    with caplog.at_level(logging.INFO):
        for done in range(0, 101):
            report(done << 20, 100 << 20)
    assert [r.message for r in caplog.records] == ["cat: downloaded 100.0 MiB of 100.0 MiB (100 %)"]


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENSEMBLE_CACHE_DIR", str(tmp_path))
    assert storage.default_cache_dir() == tmp_path
    monkeypatch.delenv("ENSEMBLE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert storage.default_cache_dir() == Path("/x/ensemble-operator")
