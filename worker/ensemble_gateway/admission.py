"""How many bytes of large bodies are received at once: clients beyond wait their turn, in order. Pure bookkeeping."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

# Smaller bodies are read as they come.
SMALL_BYTES = 64 << 10
RECEIVED_AT_ONCE_BYTES = 64 << 20


class Receiver(Protocol):
    """Someone who reads a body."""

    def resume_body(self) -> None:
        """The body may be read now."""


ReceiverT = TypeVar("ReceiverT", bound=Receiver)


class BodyBudget(Generic[ReceiverT]):
    """Admits bodies while those being received stay within `limit` bytes together; one alone is always admitted."""

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
