"""Links to workers: the same messages over ZeroMQ (`zeromq`) and in shared memory (`shared`).

The only place of the gateway that knows sockets to workers. A link connects by itself, again and again, and tells its
owner what the worker can run, what it has answered, and that it was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Protocol

import numpy as np

from ensemble_contract.errors import ProtocolError
from ensemble_contract.wire import Failed, Result, State
from ensemble_gateway.batches import Batch

Array = np.ndarray[Any, np.dtype[Any]]

SILENCE_S = 3.0
HEARTBEAT_S = 1.0


class LinkOwner(Protocol):
    """Whom a link tells. Called on the event loop; outputs are views that are valid during the call only."""

    def worker_state(self, state: State) -> None:
        """The worker says what it can run."""

    def worker_result(self, result: Result, outputs: Sequence[Array]) -> None:
        """A batch is answered; one array an output, of shape (rows, *shape)."""

    def worker_failed(self, failed: Failed) -> None:
        """A batch could not be run."""

    def worker_lost(self, worker: str, reason: str, *, blame: bool, well_until: float = inf) -> None:
        """A worker that had told its State is gone; the link has logged why, and goes on trying to reach it.

        With `blame`, what it was running may be the reason: it has not said goodbye. Not so what it was given after
        `well_until`, when it had fallen silent already: all workers of a node that is gone do so at once.
        """

    def settled(self) -> None:
        """All messages that were there have been told."""


def check_state(state: State, worker: str, cache_rows: int | None) -> None:
    """Check a State against the worker's name and, unless None, the cache that it has granted before.

    Raises ProtocolError.
    """
    if state.worker != worker:
        raise ProtocolError(f"it calls itself {state.worker!r}: its address belongs to another worker")
    if cache_rows is not None and state.cache_rows != cache_rows:
        raise ProtocolError(f"its cache has changed from {cache_rows} to {state.cache_rows} rows")
    for instance in state.instances:
        if 0 < state.cache_rows < instance.batch_size:
            batch = f"a batch of {instance.batch_size} of {instance.member!r}"
            raise ProtocolError(f"its cache of {state.cache_rows} rows is smaller than {batch}")


def check_times(result: Result, instances: int) -> None:
    """Raise ProtocolError if a Result has not the times of as many instances as its Run had."""
    if len(result.compute_ns) != instances:
        raise ProtocolError(f"a RESULT of {len(result.compute_ns)} instances, not {instances}")


class Link(Protocol):
    """A worker as the pipeline sees it."""

    worker: str
    connected: bool

    def start(self) -> None:
        """Begin to connect."""

    def send(self, batch: Batch) -> None:
        """Send a batch; its rows are in the store."""

    def flush(self) -> None:
        """Make the worker see what was sent."""

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These slots of the store are free again."""

    def reset(self, reason: str, *, blame: bool = True) -> None:
        """Give the connection up and connect anew. The owner is told if the worker was there."""

    def close(self) -> None:
        """Say goodbye and release everything."""
