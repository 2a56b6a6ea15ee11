"""The form that was measured as the fastest: remembered for a model, a torch and a kind of device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from ensemble_contract import libraries
from ensemble_contract.plan import ModelSource
from ensemble_worker import devices
from ensemble_worker.chosen_forms import ChosenForms

SOURCE = ModelSource("cat", "d", "file:///m.pt2", "torch-export")
DEVICE = devices.cpu_device(0, (0,), 1 << 30)


def test_what_was_kept_is_recalled_for_the_same_and_nothing_else(tmp_path: Path) -> None:
    chosen = ChosenForms(tmp_path)
    assert chosen.recall(SOURCE, DEVICE) == ""
    chosen.keep(SOURCE, DEVICE, "frozen")
    chosen.keep(SOURCE, DEVICE, "fused")
    assert ChosenForms(tmp_path).recall(SOURCE, replace(DEVICE, name="cpu-7")) == "fused"
    assert chosen.recall(msgspec.structs.replace(SOURCE, digest="e"), DEVICE) == ""
    assert chosen.recall(SOURCE, devices.cpu_device(0, (0, 1), 1 << 30)) == ""


def test_of_another_execution_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, text = ChosenForms(tmp_path), libraries.libraries_text()
    chosen.keep(SOURCE, DEVICE, "frozen")
    monkeypatch.setattr(libraries, "EXECUTION", libraries.EXECUTION + 1)
    assert chosen.recall(SOURCE, DEVICE) == ""
    assert libraries.libraries_text() != text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"x" * 1000])
def test_a_damaged_file_is_at_most_an_unknown_name(tmp_path: Path, content: bytes) -> None:
    chosen = ChosenForms(tmp_path)
    chosen.keep(SOURCE, DEVICE, "frozen")
    (file,) = (tmp_path / "forms").iterdir()
    file.write_bytes(content)
    assert chosen.recall(SOURCE, DEVICE) in ("", "x" * 64)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "forms").write_text("in the way")
    ChosenForms(tmp_path).keep(SOURCE, DEVICE, "frozen")
    assert ChosenForms(tmp_path).recall(SOURCE, DEVICE) == ""
