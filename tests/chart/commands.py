"""The commands of the documents, and the order in which the journey of tests/cluster/test_documents.py runs them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from charts.generate import ROOT

DOCUMENTS = ROOT / "docs"
# Documents and their sections (as their headings say; "" is what comes before the first) in the order in which the
# journey runs all that they tell a person to type.
JOURNEY = (
    ("install.md", "Chart"),
    ("reference.md", ""),
    ("cluster.md", ""),
    ("cluster.md", "Change it"),
    ("operating.md", "What to look at"),
    ("operating.md", "Metrics"),
    ("operating.md", "What happens when"),
    ("operating.md", "Scale"),
    ("troubleshooting.md", ""),
    ("troubleshooting.md", "Pods"),
    ("troubleshooting.md", "Before there is a condition"),
    ("install.md", "Upgrade"),
    ("cluster.md", "Remove it"),
    ("install.md", "Uninstall"),
)
# What the journey leaves out, by how it begins, and why.
LEFT_OUT = {
    "for target in operator gateway worker; do": "wants docker and a registry; `make images` builds the same targets",
    "docker build ": "wants docker; the images under test have the CPU build of torch",
    "make digits": "the journey has the same script train into a folder of its own",
    "make cluster-test": "is a test itself",
}


@dataclass(frozen=True, slots=True)
class Block:
    """What a person types in one go: commands, each with its further lines."""

    document: str
    section: str
    commands: tuple[str, ...]


def blocks(document: Path) -> Iterator[Block]:
    """The `console` blocks of a document; in them `$` begins a command."""
    section = ""
    found: list[str] | None = None
    for line in document.read_text().splitlines():
        text = line.strip()
        if found is None:
            section = text.removeprefix("## ") if text.startswith("## ") else section
            found = [] if text == "```console" else None
        elif text == "```":
            yield Block(document.name, section, tuple(found))
            found = None
        elif text.startswith("$ "):
            found.append(text.removeprefix("$ "))
        else:
            found[-1] += f"\n{text}"


def journey() -> Iterator[Block]:
    """The blocks that the journey runs, in its order, without what is left out."""
    for name, section in JOURNEY:
        for block in blocks(DOCUMENTS / name):
            commands = tuple(c for c in block.commands if not c.startswith(tuple(LEFT_OUT)))
            if block.section == section and commands:
                yield Block(name, section, commands)


def inline(document: Path) -> Iterator[str]:
    """Commands within the text of a document; `kubectl describe pod` only names one."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for span in re.findall(r"`((?:kubectl|helm|curl|docker) [^`\n]+)`", text):
        if not re.fullmatch(r"\w+( [a-z]+){1,3}( --[a-z-]+)?", span):
            yield span
