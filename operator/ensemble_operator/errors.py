"""The control plane's errors. They know no framework: each edge (command line, conditions) maps them in one table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_SHOWN_PROBLEMS = 50


class EnsembleError(Exception):
    """Base of every error that the control plane expects; its text says what, which object, what to do."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a resource: where (`spec.members[1].weight`) and what (`must be above 0, got -1`)."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidSpec(EnsembleError):
    """An InferenceEnsemble that cannot be believed, with all that is wrong with it.

    `source` is what the user knows the document by, such as a file's name; it starts each line of the text.
    """

    def __init__(self, problems: Iterable[Problem], source: str = "") -> None:
        self.problems = list(problems)
        self.source = source
        prefix = f"{source}: " if source else ""
        lines = [f"{prefix}{problem}" for problem in self.problems[:MAX_SHOWN_PROBLEMS]]
        if len(self.problems) > MAX_SHOWN_PROBLEMS:
            lines.append(f"{prefix}and {len(self.problems) - MAX_SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))
