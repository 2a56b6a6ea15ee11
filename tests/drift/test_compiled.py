"""What pyproject.toml lists to be compiled can be."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.drift.test_house import ROOT, pinned

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOOK = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
MODULES: list[str] = HOOK["modules"]


def sources(module: str) -> list[Path]:
    files = [ROOT / folder / (module.replace(".", "/") + ".py") for folder in HOOK["roots"]]
    return [file for file in files if file.exists()]


def test_modules_are_listed_once_and_in_order() -> None:
    assert sorted(set(MODULES)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_listed_module_exists_and_has_nothing_that_compiling_breaks(module: str) -> None:
    """mypyc keeps no annotations, which msgspec reads, and lets nobody set attributes on functions, as aiohttp does."""
    (file,) = sources(module)
    assert re.findall(r"^\s*(?:from|import) (?:msgspec|aiohttp)\b.*", file.read_text(), flags=re.MULTILINE) == []


def test_what_compiles_is_pinned() -> None:
    pins = pinned()
    wanted = [Requirement(line) for line in HOOK["dependencies"]]
    assert [str(one) for one in wanted if pins.get(one.name, "") not in one.specifier] == []
