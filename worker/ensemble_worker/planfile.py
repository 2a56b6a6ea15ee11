"""Plans as files: what a worker was told last, what it was started with, and the mirror of the ensemble's whole plan.

The mirror is a mounted ConfigMap: it lags behind what is pushed, and it is there when nobody pushes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import EnsemblePlan, WorkerPlan, decode_plan, encode_plan

_LOG = logging.getLogger(__name__)

PLAN_FILE = "plan.json"


class Mirror:
    """A worker's row of an EnsemblePlan in a file that is replaced now and then, or not there yet."""

    def __init__(self, file: Path, worker: str) -> None:
        self._file = file
        self._worker = worker
        self._stamp: tuple[int, int, int] | None = None

    def changed(self) -> WorkerPlan | None:
        """The row if the file was replaced since the last call; a worker without a row runs nothing.

        What cannot be read is logged, once, and passed over.
        """
        try:
            found = self._file.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            return decode_plan(self._file.read_bytes(), EnsemblePlan).row(self._worker)
        except FileNotFoundError:
            self._stamp = None
        except (OSError, InvalidPlan) as error:
            _LOG.warning("the plan's mirror %s is passed over: %s", self._file, error)
        return None


def read_plan(file: Path, worker: str) -> WorkerPlan | None:
    """This worker's plan in a file; None if there is none, or, after a line in the log, if it is not to be used."""
    try:
        plan = decode_plan(file.read_bytes(), WorkerPlan)
    except FileNotFoundError:
        return None
    except (OSError, InvalidPlan) as error:
        _LOG.warning("%s is passed over: %s", file, error)
        return None
    if plan.worker != worker:
        _LOG.warning("%s is passed over: it is the plan of worker %r", file, plan.worker)
        return None
    return plan


def newest(plans: Iterable[WorkerPlan | None]) -> WorkerPlan | None:
    """The plan of the highest generation; of equals the first."""
    return max((plan for plan in plans if plan is not None), key=lambda plan: plan.generation, default=None)


def keep(plan: WorkerPlan, folder: Path) -> None:
    """Write the plan where a restarted worker finds it. A folder that cannot be written is logged, and no more."""
    draft = folder / f"{PLAN_FILE}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(encode_plan(plan))
        draft.replace(folder / PLAN_FILE)
    except OSError as error:
        _LOG.warning("the plan is not kept for a restart: %s", error)
