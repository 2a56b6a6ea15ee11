"""Plans as files: what a process was told last, and the mirror of the ensemble's whole plan (a mounted ConfigMap).

With them a process that was restarted goes on with nobody to push a plan; the highest generation wins.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import EnsemblePlan, PlanT, decode_plan, encode_plan
from ensemble_contract.stamps import Stamp, file_stamp

_LOG = logging.getLogger(__name__)


class Mirror(Generic[PlanT]):
    """A file with an EnsemblePlan that others replace, and that may not be there yet. `part` is whose plan of it."""

    def __init__(self, file: Path, part: Callable[[EnsemblePlan], PlanT]) -> None:
        self._file = file
        self._part: Callable[[EnsemblePlan], PlanT] = part
        self._stamp: Stamp | None = None
        self._trouble = ""

    def look(self) -> PlanT | None:
        """The plan, if the file was not looked at before or has been replaced since.

        What cannot be used is logged, once, and tried again.
        """
        stamp = file_stamp(self._file)
        if stamp is not None and stamp == self._stamp:
            return None
        try:
            plan = self._part(decode_plan(self._file.read_bytes(), EnsemblePlan))
        except FileNotFoundError:
            self._stamp = None
            return None
        except (OSError, InvalidPlan) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                _LOG.warning("the mirror of the plan, %s, cannot be used: %s", self._file, error)
            return None
        self._stamp, self._trouble = stamp, ""
        return plan


def read_kept(file: Path, form: type[PlanT]) -> PlanT | None:
    """The plan in a file; None if there is none, or, after a line in the log, if it cannot be used."""
    try:
        return decode_plan(file.read_bytes(), form)
    except FileNotFoundError:
        return None
    except (OSError, InvalidPlan) as error:
        _LOG.warning("the plan in %s cannot be used: %s", file, error)
        return None


def keep(plan: PlanT, file: Path) -> None:
    """Write a plan for a restart. Where that is not possible it is logged, and serving goes on."""
    draft = file.with_suffix(".new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(encode_plan(plan))
        draft.replace(file)
    except OSError as error:
        _LOG.warning("the plan is not kept for a restart: %s", error)
        with contextlib.suppress(OSError):
            draft.unlink()


def newest(plans: Iterable[PlanT | None]) -> PlanT | None:
    """The plan of the highest generation, the first of equals; None without any."""
    return max((plan for plan in plans if plan is not None), key=lambda plan: plan.generation, default=None)
