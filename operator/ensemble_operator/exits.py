"""Exit codes of the `ensemble` command, and of the gateways and workers that it starts."""

from __future__ import annotations

import enum
import signal


class ExitCode(enum.IntEnum):
    """How a process of ours ended. README's table and the gateway's and worker's own constants say the same."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    INVALID_RESOURCE = 3
    MODEL_UNAVAILABLE = 4
    NOTHING_FITS = 5
    ADDRESS_UNAVAILABLE = 6


def describe(code: int) -> str:
    """A process's end in words; a negative code is the signal that ended it, as `subprocess` has it."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
