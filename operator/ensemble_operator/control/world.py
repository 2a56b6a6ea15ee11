"""What a reconcile is given, and what it answers. `process` makes one and drives the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.kinds import Key
from ensemble_operator.control.metrics import Instruments
from ensemble_operator.control.settings import Settings
from ensemble_operator.control.store import Store


@dataclass(frozen=True, slots=True)
class World:
    """The cluster to change, what it was last seen to hold, and how to go about it.

    `store` has ensembles and children without a request; what `cluster` answers to a change goes into it at once.
    `cluster.guard` raises LeadershipLost while this process may not act: also to be called before a plan is pushed.
    """

    cluster: Cluster
    store: Store
    settings: Settings
    instruments: Instruments


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reconcile ended: when to look again without being told to; None: at the next resync."""

    requeue_after_s: float | None = None


class Reconciles(Protocol):
    """Brings one ensemble towards what its resource asks for, as far as is possible now.

    Called for an ensemble that is gone, too. May be cancelled at any await, and raises what it cannot report.
    """

    async def reconcile(self, key: Key) -> Outcome:
        """Look at one ensemble."""
        ...

    async def close(self) -> None:
        """End what was started: child processes, connections."""
        ...
