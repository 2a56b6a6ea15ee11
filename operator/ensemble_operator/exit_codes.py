"""The one table from what may go wrong to the exit code of the `ensemble` command."""

from __future__ import annotations

from ensemble_operator.addresses import AddressUnavailable
from ensemble_operator.allocation.errors import AllocationError, DoesNotFit, InvalidProblem
from ensemble_operator.errors import EnsembleError, InvalidSpec
from ensemble_operator.exits import ExitCode
from ensemble_operator.resource_file import ResourceUnreadable
from ensemble_operator.serve.preparation import ModelUnavailable
from ensemble_operator.serve.walk import NoWay, VersionFailed

# The first that fits; what is not listed is unexpected and shows its traceback.
EXIT_CODES: tuple[tuple[type[Exception], ExitCode], ...] = (
    (InvalidSpec, ExitCode.INVALID_RESOURCE),
    (ResourceUnreadable, ExitCode.INVALID_RESOURCE),
    (InvalidProblem, ExitCode.INVALID_RESOURCE),
    (ModelUnavailable, ExitCode.MODEL_UNAVAILABLE),
    (VersionFailed, ExitCode.MODEL_UNAVAILABLE),
    (DoesNotFit, ExitCode.NOTHING_FITS),
    (NoWay, ExitCode.NOTHING_FITS),
    (AddressUnavailable, ExitCode.ADDRESS_UNAVAILABLE),
    (EnsembleError, ExitCode.UNEXPECTED),
    (AllocationError, ExitCode.UNEXPECTED),
    (OSError, ExitCode.UNEXPECTED),
)
EXPECTED = tuple(kind for kind, _ in EXIT_CODES)


def exit_code_of(error: Exception) -> ExitCode:
    """The exit code for an error; that of the unexpected if it is not listed."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
