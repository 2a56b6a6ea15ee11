"""Conditions, and the one table from domain errors to them: which condition, which reason, when to try again. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ensemble_contract.errors import PlanTooLarge
from ensemble_operator.control import errors
from ensemble_operator.control.planner import PlannerFailed
from ensemble_operator.errors import EnsembleError, InvalidSpec

ACCEPTED = "Accepted"
DEVICES_ACQUIRED = "DevicesAcquired"
PROFILED = "Profiled"
PLANNED = "Planned"
READY = "Ready"
DEGRADED = "Degraded"
ROLLOUT_BLOCKED = "RolloutBlocked"
TYPES = (ACCEPTED, DEVICES_ACQUIRED, PROFILED, PLANNED, READY, DEGRADED, ROLLOUT_BLOCKED)
# True is bad for these.
ABNORMAL = frozenset({DEGRADED, ROLLOUT_BLOCKED})

TRUE, FALSE, UNKNOWN = "True", "False", "Unknown"
MAX_MESSAGE = 8_000


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition without its times."""

    status: str
    reason: str
    message: str


class NameTaken(EnsembleError):
    """An object that is not ours has the name of a child; the message says which, and what to do."""


class NotServed(EnsembleError):
    """The cluster does not serve a kind of object that the resource needs; the message says what to use instead."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What an error means: the condition that becomes bad, why in a word, and when to try again (None: when told)."""

    condition: str
    reason: str
    retry_s: float | None


# Not the ensemble's business, and soon over: the queue tries again.
PASSING = (errors.Unavailable, errors.Conflict, errors.LeadershipLost)
# The first that fits counts. What is neither here nor passing is told as it is, and the queue tries again.
TABLE: Mapping[type[Exception], Treatment] = {
    InvalidSpec: Treatment(ACCEPTED, "InvalidSpec", None),
    NameTaken: Treatment(ACCEPTED, "NameTaken", 60.0),
    NotServed: Treatment(ACCEPTED, "NotServed", 60.0),
    errors.Forbidden: Treatment(DEGRADED, errors.Forbidden.reason, 60.0),
    errors.Refused: Treatment(DEGRADED, errors.Refused.reason, 30.0),
    errors.Invalid: Treatment(DEGRADED, errors.Invalid.reason, 60.0),
    errors.NamespaceTerminating: Treatment(DEGRADED, errors.NamespaceTerminating.reason, 60.0),
    PlanTooLarge: Treatment(PLANNED, "PlanTooLarge", None),
    PlannerFailed: Treatment(PLANNED, "PlannerFailed", 30.0),
}


def treatment_of(error: Exception) -> Treatment | None:
    """What an error means; None if it is not in the table."""
    return next((treatment for kind, treatment in TABLE.items() if isinstance(error, kind)), None)


@dataclass(slots=True)
class Conditions:
    """What one reconcile has found, by type of condition; the last word about one counts."""

    said: dict[str, Condition] = field(default_factory=dict)

    def say(self, type_: str, *, holds: bool, reason: str, message: str) -> None:
        """A condition holds, or does not."""
        self.said[type_] = Condition(TRUE if holds else FALSE, reason, message[:MAX_MESSAGE])

    def fail(self, error: Exception, treatment: Treatment) -> None:
        """An error of the table."""
        self.say(
            treatment.condition,
            holds=treatment.condition in ABNORMAL,
            reason=treatment.reason,
            message=str(error),
        )

    def fail_unexpectedly(self, error: Exception) -> None:
        """An error that nobody has foreseen."""
        self.say(
            DEGRADED,
            holds=True,
            reason="InternalError",
            message=(
                f"the operator cannot go on with this ensemble: {type(error).__name__}: {error}; what runs stays, and"
                " it is tried again. The operator's log has more: please report it"
            ),
        )

    def complete(self, before: Mapping[str, Condition]) -> Iterator[tuple[str, Condition]]:
        """All conditions in order: what was not looked at this time is as it was, or unknown."""
        for type_ in TYPES:
            found = self.said.get(type_) or before.get(type_)
            yield type_, found or Condition(UNKNOWN, "NotYet", "not looked at yet: what comes before it is not done")
