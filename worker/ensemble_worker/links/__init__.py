"""Links to gateways: the same messages over ZeroMQ (`zeromq`) and in shared memory (`shared`).

The only place of the worker that knows sockets to gateways. Two threads use a server: the executor receives work and
answers it; the control thread (asyncio) welcomes gateways, tells them the State and keeps the heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ensemble_contract.errors import ProtocolError
from ensemble_contract.wire import FailureCode, RowRanges, Run, State

Array = np.ndarray[Any, np.dtype[Any]]


class Rows(Protocol):
    """Rows that a gateway has put within reach, by slot."""

    slots: int

    def put(self, ranges: RowRanges, arrays: Sequence[Array]) -> None:
        """Take rows into these slots: one array an input, of shape (rows, *shape)."""

    def gather(self, ranges: RowRanges) -> Sequence[Any]:
        """The rows of these ranges, one array or tensor an input, contiguous; valid until the next call."""


class Peer(Protocol):
    """One gateway, as the executor sees it."""

    rows: Rows

    def answer(self, run: Run, pieces: Sequence[Sequence[Array]], compute_ns: Sequence[int], queue_ns: int) -> None:
        """Send a batch's outputs, in pieces: of one of its instances, or of several, which follow in its order.

        A piece has a C-contiguous array for each output, of shape (rows, *shape) or (instances, rows, *shape).
        """

    def fail(self, run: Run, code: FailureCode, text: str) -> None:
        """Say that a batch could not be run."""


class Work(NamedTuple):
    """A batch to run, for whom, and when it came (monotonic nanoseconds)."""

    peer: Peer
    run: Run
    received_ns: int


class LinkServer(Protocol):
    """All gateways of this worker."""

    def start(self) -> None:
        """Accept gateways, on the running event loop. Raises OSError if the address cannot be bound."""

    def receive(self, block: bool) -> list[Work]:
        """Batches that have come; waits for one if `block`. May return early and empty. Executor only."""

    def wake(self) -> None:
        """Make a waiting `receive` return."""

    def broadcast(self) -> None:
        """Tell every gateway the State again."""

    def close(self) -> None:
        """Say goodbye to every gateway, which takes back what it has in flight here; the executor has ended."""


class NoRows:
    """What is left of the rows of a gateway that has gone: nothing, so that what it still had here is refused."""

    slots = 0

    def put(self, ranges: RowRanges, arrays: Sequence[Array]) -> None:
        """Forget them."""

    def gather(self, ranges: RowRanges) -> Sequence[Any]:  # noqa: ARG002  # the protocol's signature
        """Raises LookupError."""
        raise LookupError("the gateway has gone, and its rows with it")


def check_slots(ranges: RowRanges, slots: int) -> None:
    """Raise ProtocolError if a PUT's range ends beyond `slots`, or if it has more rows than there are slots."""
    end = max(map(int.__add__, ranges.starts, ranges.counts))
    if end > slots or ranges.rows > slots:
        raise ProtocolError(f"a PUT of {ranges.rows} rows up to slot {end}, where there are {slots} slots")


StateMaker = Callable[[int, int], State]
"""The State for one of so many gateways, each of which may keep so many rows here."""

RowsMaker = Callable[[int], Rows]
"""A cache of so many rows, on this worker's device."""
