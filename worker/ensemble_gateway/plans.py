"""Plans in files: the ensemble's mirror (a mounted ConfigMap), and the newest plan that this gateway has taken.

With them a gateway serves whatever has been restarted, with nobody to push a plan. The newest wins.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import EnsemblePlan, GatewayPlan, decode_plan, encode_plan

_LOG = logging.getLogger(__name__)

KEPT_FILE = "gateway-plan.json"


class Mirror:
    """A file that others replace: `look` reads it when it has changed, and logs once what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._trouble = ""

    def look(self) -> GatewayPlan | None:
        """The plan, if the file was not looked at before or has been replaced since."""
        try:
            found = self._path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return None
            plan = decode_plan(self._path.read_bytes(), EnsemblePlan).gateway
        except (OSError, InvalidPlan) as error:
            self._complain(str(error))
            return None
        self._stamp, self._trouble = stamp, ""
        return plan

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            _LOG.warning("the mirror of the plan, %s, cannot be used: %s", self._path, trouble)


class KeptPlan:
    """The newest plan taken, in a folder that outlives the process."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / KEPT_FILE

    def read(self) -> GatewayPlan | None:
        """The plan that was kept; None, and a line in the log, if what is there is none."""
        try:
            return decode_plan(self._file.read_bytes(), GatewayPlan)
        except FileNotFoundError:
            return None
        except (OSError, InvalidPlan) as error:
            _LOG.warning("the kept plan %s cannot be used: %s", self._file, error)
            return None

    def write(self, plan: GatewayPlan) -> None:
        """Keep a plan; serving goes on where that is not possible."""
        draft = self._file.with_suffix(".new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(encode_plan(plan))
            draft.replace(self._file)
        except OSError as error:
            _LOG.warning("the plan cannot be kept in %s: %s", self._file, error)
            with contextlib.suppress(OSError):
                draft.unlink()


def newest_of(*plans: GatewayPlan | None) -> GatewayPlan | None:
    """The plan with the highest generation, the first of several; None without any."""
    known = [plan for plan in plans if plan is not None]
    return max(known, key=lambda plan: plan.generation, default=None)
