"""The child process that plans: `python -m ensemble_operator.control.planning_child`.

A question a line, an answer a line. It alone of the operator imports the search and its solver, so that
neither their memory nor their time is the operator's. It ends at the end of its input.
"""

from __future__ import annotations

import os
import sys
import time

import msgspec

from ensemble_contract.orphan import die_with_parent
from ensemble_operator.allocation.errors import AllocationError, DoesNotFit
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.memory import is_feasible
from ensemble_operator.allocation.planner import plan
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.allocation.throughput import rows_per_s
from ensemble_operator.control.questions import DOES_NOT_FIT, INVALID, Cell, PlanAnswer, PlanQuestion, decode_question

# What serves and what reconciles goes first.
NICENESS = 5


def answer(question: PlanQuestion) -> PlanAnswer:
    """The plan for a problem, and how the matrix that runs would do on it; what is wrong, as an answer, too."""
    try:
        found = plan(question.problem, question.options, clock=time.monotonic)
    except DoesNotFit as error:
        return PlanAnswer(error=str(error), kind=DOES_NOT_FIT)
    except (AllocationError, ArithmeticError) as error:
        return PlanAnswer(error=str(error), kind=INVALID)
    return PlanAnswer(
        cells=tuple((cell.device, cell.member, cell.batch_size) for cell in found.matrix.cells()),
        predicted_rows_per_s=found.predicted_rows_per_s,
        bound_rows_per_s=found.bound_rows_per_s,
        why=found.bottleneck.why,
        running_rows_per_s=_rate_of(question.problem, question.running),
        seconds=found.seconds,
    )


def _rate_of(problem: Problem, cells: tuple[Cell, ...]) -> float:
    """Rows/s that a matrix reaches on a problem; 0 if it cannot run there."""
    devices = {device.name: at for at, device in enumerate(problem.devices)}
    members = {member.name: at for at, member in enumerate(problem.members)}
    matrix = Matrix.empty(problem)
    sizes = matrix.sizes.copy()
    for device, member, size in cells:
        if device not in devices or member not in members or size not in problem.batch_sizes:
            return 0.0
        sizes[devices[device], members[member]] = size
    matrix = Matrix.of(problem, sizes)
    return rows_per_s(problem, matrix) if is_feasible(problem, matrix) else 0.0


def main(arguments: list[str]) -> int:
    """Answer questions until there are no more; `arguments` has the parent's process id."""
    die_with_parent(int(arguments[0]))
    os.nice(NICENESS)
    # Only answers go where answers are read: the solver may print lines of its own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin.buffer:
        try:
            said = answer(decode_question(line))
        except AllocationError as error:
            said = PlanAnswer(error=str(error), kind=INVALID)
        answers.write(msgspec.json.encode(said) + b"\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
