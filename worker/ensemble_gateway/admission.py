"""How long clients may keep a connection waiting, and how many bytes of large bodies come at once. Pure bookkeeping."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ensemble_contract.plan import GatewayPlan

# Smaller bodies are read as they come.
SMALL_BYTES = 64 << 10
RECEIVED_AT_ONCE_BYTES = 32 << 20
# A body lies in memory beside the rows in the store, and its JSON beside that: larger requests go in parts.
MAX_BODY_BYTES = 64 << 20
# JSON and framing around the rows of the largest request that a small store can take.
BODY_MARGIN_BYTES = 1 << 20


def body_limit(plan: GatewayPlan | None) -> int:
    """The bytes of the largest body that is read under a plan."""
    return (min(plan.max_queue_bytes, MAX_BODY_BYTES) if plan else MAX_BODY_BYTES) + BODY_MARGIN_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """How long clients may keep a connection waiting.

    A head must have come within `stall_s` of its first byte, a body within `stall_s` and its size at
    `slowest_bytes_per_s`; answers must be taken without a pause of `stall_s`; `idle_s` may pass between requests, and
    `linger_s` between an error after which nothing more is read and the end.
    """

    stall_s: float = 60.0
    slowest_bytes_per_s: float = 32 << 10
    idle_s: float = 300.0
    linger_s: float = 2.0

    def body_s(self, size: int) -> float:
        """How long a body of so many bytes may take."""
        return self.stall_s + size / self.slowest_bytes_per_s


class Receiver(Protocol):
    """Someone who reads a body."""

    def resume_body(self) -> None:
        """The body may be read now."""


ReceiverT = TypeVar("ReceiverT", bound=Receiver)


class BodyBudget(Generic[ReceiverT]):
    """Admits bodies, in order, while all being received stay within `limit` bytes; one alone is always admitted."""

    def __init__(self, limit: int = RECEIVED_AT_ONCE_BYTES) -> None:
        self._limit = limit
        self._admitted: dict[ReceiverT, int] = {}
        self._waiting: OrderedDict[ReceiverT, int] = OrderedDict()
        self._bytes = 0

    def admit(self, receiver: ReceiverT, size: int) -> bool:
        """Whether `receiver` may read its body of `size` bytes now; else its `resume_body` is called in its turn."""
        if size <= SMALL_BYTES or receiver in self._admitted:
            return True
        if receiver in self._waiting:
            return False
        if self._waiting or not self._fits(size):
            self._waiting[receiver] = size
            return False
        self._take(receiver, size)
        return True

    def release(self, receiver: ReceiverT) -> None:
        """`receiver` has read its body, or has left."""
        if not self._admitted and not self._waiting:
            return
        self._waiting.pop(receiver, None)
        self._bytes -= self._admitted.pop(receiver, 0)
        while self._waiting:
            following, size = next(iter(self._waiting.items()))
            if not self._fits(size):
                return
            del self._waiting[following]
            self._take(following, size)
            following.resume_body()

    def _fits(self, size: int) -> bool:
        return not self._admitted or self._bytes + size <= self._limit

    def _take(self, receiver: ReceiverT, size: int) -> None:
        self._admitted[receiver] = size
        self._bytes += size
