"""The link to a worker on the same machine: rows, descriptors and results in shared memory, eventfds as doorbells.

A Unix socket carries what is rare (Hello with the file descriptors, State, Bye), and its end tells at once that the
worker is gone. Every connection has rings and a result arena of its own, so that a worker that was given up and comes
back to life cannot write where anybody still reads. Nothing has a name that would have to be unlinked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.layout import StoreLayout, aligned, result_offsets
from ensemble_contract.ring import HEADER_BYTES, Ring
from ensemble_gateway.batches import Batch
from ensemble_gateway.links import LinkOwner, check_state, check_times
from ensemble_gateway.links.cache import CacheMap, Pinned, freed_ranges
from ensemble_gateway.links.memory import Arena, SharedMemory
from ensemble_gateway.request import Array
from ensemble_gateway.rowstore import RowStore

_LOG = logging.getLogger(__name__)

# A record takes half of a ring at most: the longest is a Put of 65,536 ranges, each with its source.
RING_BYTES = HEADER_BYTES + (4 << 20)
# Only the pages that results have touched take memory.
ARENA_BYTES = 16 << 30
RETRY_S = 0.1
# A worker that hangs up without a State does so again.
REFUSED_RETRY_S = 2.0
ROOM_AGAIN_S = 0.001


class SharedLink:
    """One worker, by the path of its Unix socket."""

    def __init__(
        self, worker: str, path: str, memory: SharedMemory, store: RowStore, gateway: str, owner: LinkOwner,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.connected = False
        self._path = path
        self._memory = memory
        self._layout = store.layout
        self._outputs = store.output_specs
        self._gateway = gateway
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._retry: asyncio.TimerHandle | None = None
        self._session: _Session | None = None
        self._cache: CacheMap | None = None
        self._cache_rows = 0
        self._blocked: deque[Batch] = deque()
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Connect now, and again every 100 ms until the worker is there."""
        self._retry = None
        sock = None
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            sock.connect(self._path)
            session = self._session = _Session(sock)
        except OSError:
            if sock is not None:
                sock.close()
            self._retry = self._loop.call_later(RETRY_S, self.start)
            return
        self._loop.add_reader(sock.fileno(), self._control)
        self._loop.add_reader(session.to_gateway, self._drain)
        try:
            session.greet(self._gateway, self._memory, self._layout)
        except OSError as error:
            self.reset(f"it cannot be greeted: {error}")

    def send(self, batch: Batch) -> None:
        """Write the batch's Run into the ring, behind a Put of the rows that a device with a cache of its own lacks."""
        if self._session is not None and (self._blocked or not self._write(self._session, batch)):
            self._blocked.append(batch)

    def flush(self) -> None:
        """Ring the worker's doorbell if anything was written; again in a moment while not everything found room."""
        session = self._session
        if session is None:
            return
        try:
            written = session.ring_worker()
        except ProtocolError as error:
            self._loop.call_soon(self._break, session, error)
            return
        if not written and self._again is None:
            self._again = self._loop.call_later(ROOM_AGAIN_S, self._flush_again)

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These slots of the store are free again."""
        if self._cache is not None:
            self._cache.forget(ranges)

    def reset(self, reason: str, *, blame: bool = True) -> None:
        """Hang up, tell the owner if the worker was there, and connect anew."""
        connected = self.connected
        self._drop()
        _LOG.warning("worker %s %s: %s", self.worker, "is lost" if connected else "cannot be used", reason)
        if not self._closed and self._retry is None:
            self._retry = self._loop.call_later(RETRY_S if connected else REFUSED_RETRY_S, self.start)
        if connected:
            self._owner.worker_lost(self.worker, reason, blame=blame)
            self._owner.settled()

    def close(self) -> None:
        """Say goodbye and let go of all memory."""
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._session is not None:
            with contextlib.suppress(OSError):
                self._session.sock.send(wire.BYE)
        self._drop()

    def _write(self, session: _Session, batch: Batch) -> bool:
        """Write a batch; False, and nothing is written, if there is no room for its rows or results now."""
        many = len(batch.instances)
        starts, size = result_offsets(self._outputs, many * batch.rows)
        ranges, pinned = batch.ranges, None
        at = session.arena.take(size)
        if at is None:
            return False
        if self._cache is not None:
            placement = self._cache.place(ranges)
            if placement is None:
                session.arena.give(at, size)
                return False
            if placement.missing_cache:
                session.push(wire.encode_put(placement.missing_cache, placement.missing_store))
            ranges, pinned = placement.rows, placement.pinned
        session.in_flight[batch.id] = _Flight(at, size, starts, many, batch.rows, pinned)
        session.push(wire.encode_run(batch.id, [one.id for one in batch.instances], batch.rows, at, ranges))
        return True

    def _write_blocked(self, session: _Session) -> None:
        while self._blocked and self._write(session, self._blocked[0]):
            batch = self._blocked.popleft()
            if self._cache is not None:
                self._cache.forget(freed_ranges(batch))
        self.flush()

    def _flush_again(self) -> None:
        self._again = None
        self.flush()

    def _drop(self) -> None:
        session, self._session, self._cache, self.connected = self._session, None, None, False
        self._blocked.clear()
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if session is not None:
            self._loop.remove_reader(session.sock.fileno())
            self._loop.remove_reader(session.to_gateway)
            session.close()

    def _break(self, session: _Session, error: ProtocolError) -> None:
        if session is self._session:
            self.reset(f"it broke the protocol: {error}")

    def _control(self) -> None:
        session = self._session
        if session is None:
            return
        try:
            packet = session.sock.recv(wire.MAX_CONTROL_BYTES + 64)
        except BlockingIOError:
            return
        except OSError as error:
            self.reset(f"its connection broke: {error}")
            return
        try:
            message = wire.decode(packet) if packet else wire.Bye()
            if isinstance(message, wire.State):
                self._learn(message)
                return
        except ProtocolError as error:
            self._break(session, error)
            return
        if isinstance(message, wire.Bye):
            self._drain()
            if session is self._session:
                self.reset("it has left" if packet else "its process has ended", blame=not packet)
        else:
            self._break(session, ProtocolError(f"a {type(message).__name__} beside the ring"))

    def _learn(self, state: wire.State) -> None:
        check_state(state, self.worker, self._cache_rows if self.connected else None)
        if not self.connected:
            self._cache_rows = state.cache_rows
            self._cache = CacheMap(self._layout.slots, state.cache_rows) if state.cache_rows else None
        self.connected = True
        self._owner.worker_state(state)
        self._owner.settled()

    def _drain(self) -> None:
        session = self._session
        if session is None:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(session.to_gateway)
        try:
            for record in session.from_worker.pop_all():
                self._take(session, wire.decode(record))
            if self._blocked:
                self._write_blocked(session)
        except ProtocolError as error:
            self._break(session, error)
            return
        self._owner.settled()

    def _take(self, session: _Session, message: wire.Message) -> None:
        if not isinstance(message, wire.Result | wire.Failed):
            raise ProtocolError(f"a {type(message).__name__} in the ring")
        flight = session.in_flight.pop(message.batch, None)
        if flight is None:
            raise ProtocolError(f"batch {message.batch} was not asked for")
        at, size, starts, many, rows, pinned = flight
        if self._cache is not None and pinned is not None:
            self._cache.unpin(pinned)
        if isinstance(message, wire.Failed):
            self._owner.worker_failed(message)
        else:
            check_times(message, many)
            outputs: list[Array] = [
                np.ndarray((many, rows, *spec.shape), spec.dtype, session.results, at + start)
                for start, spec in zip(starts, self._outputs, strict=True)
            ]
            self._owner.worker_result(message, outputs)
        session.arena.give(at, size)


class _Flight(NamedTuple):
    """Where a batch's outputs will be, and the rows of the worker's cache that it needs until then."""

    at: int
    size: int
    starts: list[int]
    many: int
    rows: int
    pinned: Pinned | None


class _Session:
    """What one connection has: socket, rings, results, doorbells. Both sides drop it as a whole."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        ring = aligned(RING_BYTES, mmap.PAGESIZE)
        with contextlib.ExitStack() as undo:
            self.to_worker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self.to_worker)
            self.to_gateway = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(os.close, self.to_gateway)
            self._shared = SharedMemory("ensemble-link", 2 * ring + ARENA_BYTES)
            undo.pop_all()
        memory = self._shared.memory
        self._to = Ring(memory[:RING_BYTES])
        self.from_worker = Ring(memory[ring : ring + RING_BYTES])
        self.results = memory[2 * ring :]
        self.arena = Arena(ARENA_BYTES)
        self.in_flight: dict[int, _Flight] = {}
        self._backlog: deque[bytes] = deque()
        self._rung = True

    def greet(self, gateway: str, store: SharedMemory, layout: StoreLayout) -> None:
        """Send the Hello with the four descriptors: store, link memory, and the doorbells to worker and gateway."""
        shared = wire.SharedLayout(layout.total_bytes, layout.slots, RING_BYTES, ARENA_BYTES)
        hello = wire.encode_control(wire.Hello(gateway, shared=shared))
        socket.send_fds(self.sock, [hello], [store.fd, self._shared.fd, self.to_worker, self.to_gateway])

    def push(self, record: bytes) -> None:
        """Write a record, now or, if the ring is full, when the doorbell is rung again."""
        self._backlog.append(record)
        self._rung = False

    def ring_worker(self) -> bool:
        """Wake the worker once for all records since the last time; False while the ring has no room for some.

        Raises ProtocolError if the worker has spoilt the ring.
        """
        if self._rung:
            return True
        backlog = self._backlog
        while backlog and self._to.push(backlog[0]):
            backlog.popleft()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.to_worker, 1)
        self._rung = not backlog
        return self._rung

    def close(self) -> None:
        """Let go of everything."""
        self.sock.close()
        os.close(self.to_worker)
        os.close(self.to_gateway)
        self._shared.close()
