"""What the operator asks its planning process, and what that answers: JSON, a line each. Without the solver."""

from __future__ import annotations

import hashlib

import msgspec

from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.problem import Problem

Cell = tuple[str, str, int]

DOES_NOT_FIT = "DoesNotFit"
INVALID = "InvalidProblem"


class PlanQuestion(msgspec.Struct, frozen=True, rename="camel"):
    """A problem, how to plan it, and the cells (device, member, batch size) of the matrix that runs.

    `versions` are the members' digests: another version is another question, however alike they are.
    """

    problem: Problem
    options: PlanOptions
    versions: tuple[str, ...] = ()
    running: tuple[Cell, ...] = ()

    @property
    def identity(self) -> str:
        """Sixteen hex digits that change whenever the answer might; what runs is not part of it."""
        parts = msgspec.json.encode((self.problem, self.options, self.versions), order="deterministic")
        return hashlib.sha256(parts).hexdigest()[:16]


class PlanAnswer(msgspec.Struct, frozen=True, rename="camel"):
    """The cells of the best matrix found, its rows/s, and those of the matrix that runs (0: it cannot run so).

    With `error` there is no matrix; `kind` is then DoesNotFit or InvalidProblem.
    """

    cells: tuple[Cell, ...] = ()
    predicted_rows_per_s: float = 0.0
    bound_rows_per_s: float = 0.0
    why: str = ""
    running_rows_per_s: float = 0.0
    seconds: float = 0.0
    error: str = ""
    kind: str = ""


def decode_question(line: bytes) -> PlanQuestion:
    """A question from its line.

    Raises InvalidProblem.
    """
    try:
        return msgspec.json.decode(line, type=PlanQuestion)
    except msgspec.DecodeError as error:
        raise InvalidProblem([str(error)]) from error
