"""The house as its documents describe it: what README, CONTRIBUTING and constraints.txt say exists, exists."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ensemble_operator import resource_file
from ensemble_operator.api import parse_yaml
from ensemble_operator.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md"), *ROOT.glob("changelog.d/*.md")]
)
EXAMPLES = sorted(ROOT.glob("examples/*/ensemble.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(document: Path) -> str:
    """What a document shows as code: fenced blocks and inline spans."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", document.read_text(), flags=re.DOTALL))


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("folder", ["operator", "worker"])
def test_folder_is_no_package(folder: str) -> None:
    """A package named `operator` at the root would shadow the standard library's module."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_standard_library_operator_is_not_shadowed() -> None:
    program = "import operator; print(operator.add(20, 22))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "42"), done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|[`$ ])make ([a-z-]+)", code_of(document), flags=re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_commands_exist(document: Path) -> None:
    parser = build_parser()
    subcommands = {name for action in parser._actions for name in (action.choices or ())}
    named = set(re.findall(r"(?:^|[`$/]|\$ )ensemble ([a-z]+)", code_of(document), flags=re.MULTILINE))
    assert named <= subcommands


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"#]+)", text)
    broken = [t for t in targets if not re.match(r"[a-z]+:", t) and not (document.parent / t).exists()]
    assert broken == []


def test_readme_names_its_two_commands_first() -> None:
    head = (ROOT / "README.md").read_text().split("\n## ", maxsplit=1)[0]
    assert "make demo" in head
    assert "make test" in head


def test_resources_in_documents_are_valid() -> None:
    shown = [
        block
        for document in DOCUMENTS
        for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), flags=re.DOTALL)
        if "kind: InferenceEnsemble" in block
    ]
    assert shown
    for block in shown:
        assert parse_yaml(block, source="README").spec.members


@pytest.mark.parametrize("file", EXAMPLES, ids=relative)
def test_examples_are_valid(file: Path) -> None:
    ensemble = resource_file.load(file)
    for output, names in resource_file.read_labels(ensemble).items():
        shape = next(tensor.shape for tensor in ensemble.spec.outputs if tensor.name == output)
        assert (len(names),) == shape
        assert len(set(names)) == len(names)
    assert (file.parent / "README.md").exists()
    assert (file.parent / "client.py").exists()


def test_map_of_the_repository_is_complete() -> None:
    """CONTRIBUTING has a line for every folder that git would keep, and for none that is not there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^\| `([\w./-]+)/` \|", text, flags=re.MULTILINE))
    assert {folder for folder in named if not (ROOT / folder).is_dir()} == set()
    kept = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {name for name in kept - {"build", "dist"} if not any(n.split("/")[0] == name for n in named)} == set()


def test_every_tested_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        canonicalize_name(name): [Requirement(r) for r in rs] for name, rs in project["optional-dependencies"].items()
    }
    wanted, todo = [Requirement(r) for r in project["dependencies"]], ["dev"]
    while todo:
        for requirement in extras[canonicalize_name(todo.pop())]:
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                todo.extend(requirement.extras)
            else:
                wanted.append(requirement)
    pins = pinned()
    missing = [r.name for r in wanted if canonicalize_name(r.name) not in pins]
    assert missing == []
    assert [str(r) for r in wanted if pins[canonicalize_name(r.name)] not in r.specifier] == []
    assert "+" not in "".join(pins.values()), "a local version is not on PyPI"
