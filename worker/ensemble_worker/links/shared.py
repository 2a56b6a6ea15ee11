"""Gateways on the same machine: rows, descriptors and results in shared memory, eventfds as doorbells.

A gateway connects to the Unix socket and passes four descriptors with its Hello: its row store, the link's memory
(rings and results) and the two doorbells. The store is mapped for reading only: a worker cannot damage it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.layout import StoreLayout, aligned, result_offsets
from ensemble_contract.ring import Ring
from ensemble_contract.tensors import TensorSpec
from ensemble_worker.gather import HostRows
from ensemble_worker.links import NoRows, Rows, RowsMaker, StateMaker, Work, check_slots

_LOG = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

ACCEPT_AGAIN_S = 1.0
# So long a CPU worker waits for the next batch before it sleeps. To wake a core that sleeps takes tens of microseconds
# of those who ring and of those who hear it, as much as a batch of tiny members; many batches come sooner than this.
AWAKE_NS = 500_000


class SharedServer:
    """Accepts gateways at a Unix socket. With `make_rows` (a GPU) rows are copied to the device when they are put."""

    def __init__(
        self, path: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
        state_for: StateMaker, make_rows: RowsMaker | None, cache_rows: int,
    ) -> None:  # fmt: skip
        self._path = path
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._state_for = state_for
        self._make_rows = make_rows
        self._cache_rows = cache_rows if make_rows is not None else 0
        # A GPU's batches run in other threads, which need the interpreter meanwhile.
        self._awake_ns = AWAKE_NS if make_rows is None else 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._greeting: set[socket.socket] = set()
        self._peers: dict[int, SharedPeer] = {}
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Listen. Raises OSError if the socket's path cannot be bound."""
        self._path.unlink(missing_ok=True)
        self._listener.bind(str(self._path))
        self._listener.listen(64)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def receive(self, block: bool) -> list[Work]:
        """Batches that have come, from every gateway that has rung."""
        works: list[Work] = []
        for fd, _ in self._rung(block):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                self._bury()
                continue
            peer = self._peers.get(fd)
            if peer is not None:
                try:
                    works += peer.receive()
                except (OSError, ProtocolError) as error:
                    _LOG.warning("gateway %s broke the protocol and is dropped: %s", peer.name, error)
                    peer.gone = True
                    self._bury()
        return works

    def _rung(self, block: bool) -> list[tuple[int, int]]:
        """The doorbells that have rung, with their events; waits for one if `block`.

        The core stays awake at first, but whoever else wants it gets it at once.
        """
        rung = self._epoll.poll(0)
        if rung or not block:
            return rung
        now = time.monotonic_ns()
        until = now + self._awake_ns
        while now < until:
            os.sched_yield()
            rung = self._epoll.poll(0)
            if rung:
                return rung
            now = time.monotonic_ns()
        return self._epoll.poll(-1)

    def wake(self) -> None:
        """Make a waiting `receive` return."""
        os.eventfd_write(self._wake, 1)

    def broadcast(self) -> None:
        """Tell every gateway the State again."""
        living = [peer for peer in list(self._peers.values()) if not peer.gone]
        message = wire.encode_control(self._state_for(len(living), self._cache_rows))
        for peer in living:
            try:
                peer.sock.send(message)
            except OSError as error:
                # Without this State it would go on with a wrong idea of what runs here.
                _LOG.warning("gateway %s cannot be told the State and is dropped: %s", peer.name, error)
                peer.gone = True
                self.wake()

    def close(self) -> None:
        """Say goodbye and stop accepting; the executor has ended."""
        if self._loop is not None:
            self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for sock in list(self._greeting):
            self._close_socket(sock)
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.sock.send(wire.BYE)
            self._close_socket(peer.sock)
            peer.close()
        self._peers.clear()
        self._epoll.close()
        os.close(self._wake)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _LOG.error("no gateway can connect: %s", error)
            loop.remove_reader(self._listener.fileno())
            loop.call_later(ACCEPT_AGAIN_S, self._listen_again)
            return
        sock.setblocking(False)
        self._greeting.add(sock)
        loop.add_reader(sock.fileno(), self._greet, sock)

    def _listen_again(self) -> None:
        if self._loop is not None and self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _greet(self, sock: socket.socket) -> None:
        """The first packet of a connection: Hello with its descriptors."""
        loop = asyncio.get_running_loop()
        fds: list[int] = []
        try:
            packet, fds, _, _ = socket.recv_fds(sock, wire.MAX_CONTROL_BYTES + 64, 4)
            peer = self._welcome(sock, packet, fds)
            # By edge: every ring is told once, to who is known by then, and nothing need be read to silence it.
            self._peers[peer.doorbell] = peer
            self._epoll.register(peer.doorbell, select.EPOLLIN | select.EPOLLET)
        except (OSError, ProtocolError, ValueError) as error:
            for fd in fds:
                self._peers.pop(fd, None)
            # As text: the exception's traceback refers to what was mapped.
            _LOG.warning("a connection that is not a gateway's was closed: %s", str(error))
            self._close_socket(sock)
            for fd in fds:
                os.close(fd)
            return
        for fd in fds[:2]:
            os.close(fd)
        self._greeting.discard(sock)
        loop.add_reader(sock.fileno(), self._hear, peer)
        self.broadcast()

    def _welcome(self, sock: socket.socket, packet: bytes, fds: list[int]) -> SharedPeer:
        message = wire.decode(packet)
        if not isinstance(message, wire.Hello) or message.shared is None or len(fds) != 4:
            raise ProtocolError(f"a {type(message).__name__} with {len(fds)} descriptors, not a Hello with four")
        shared = message.shared
        layout = StoreLayout(self._inputs, shared.slots)
        if layout.total_bytes != shared.store_bytes:
            raise ProtocolError(f"a store of {shared.store_bytes} bytes, not {layout.total_bytes}: other inputs")
        if not all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK for fd in fds[:2]):
            raise ProtocolError("memory that could shrink under a reader: it has to be sealed against that")
        rows = self._make_rows(self._cache_rows) if self._make_rows is not None else None
        return SharedPeer(message.gateway, sock, fds, shared, layout, self._outputs, rows, self.wake)

    def _hear(self, peer: SharedPeer) -> None:
        """Gateways say nothing more here but goodbye; the end of the connection says the same."""
        try:
            packet = peer.sock.recv(wire.MAX_CONTROL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet and packet != wire.BYE:
            _LOG.warning(
                "gateway %s broke the protocol and is dropped: %d bytes after its Hello", peer.name, len(packet)
            )
        asyncio.get_running_loop().remove_reader(peer.sock.fileno())
        peer.gone = True
        self.wake()

    def _bury(self) -> None:
        """Drop gateways that are gone. Done by the executor, which alone uses their memory and doorbells."""
        gone = [peer for peer in list(self._peers.values()) if peer.gone]
        for peer in gone:
            self._epoll.unregister(peer.doorbell)
            del self._peers[peer.doorbell]
            peer.close()
        if gone and self._loop is not None:
            self._loop.call_soon_threadsafe(self._hang_up, gone)

    def _hang_up(self, gone: list[SharedPeer]) -> None:
        """Close the sockets of gateways that are gone, in the thread that watches them; others get their credits."""
        for peer in gone:
            self._close_socket(peer.sock)
        self.broadcast()

    def _close_socket(self, sock: socket.socket) -> None:
        self._greeting.discard(sock)
        if self._loop is not None and sock.fileno() >= 0:
            self._loop.remove_reader(sock.fileno())
        sock.close()


class SharedPeer:
    """One gateway on the same machine."""

    # What `close` lets go of: compiled classes want it said.
    __deletable__ = ("_from", "_store", "_to")

    def __init__(
        self, name: str, sock: socket.socket, fds: list[int], shared: wire.SharedLayout,
        layout: StoreLayout, outputs: tuple[TensorSpec, ...], rows: Rows | None, on_gone: Callable[[], None],
    ) -> None:  # fmt: skip
        store_fd, link_fd, self.doorbell, self._gateway_doorbell = fds
        self.name = name
        self.sock = sock
        self.gone = False
        self._on_gone = on_gone
        # Whatever they are, they shall not make a thread wait.
        os.set_blocking(self.doorbell, False)
        os.set_blocking(self._gateway_doorbell, False)
        ring = aligned(shared.ring_bytes, mmap.PAGESIZE)
        store = memoryview(mmap.mmap(store_fd, shared.store_bytes, access=mmap.ACCESS_READ))
        link = memoryview(mmap.mmap(link_fd, 2 * ring + shared.arena_bytes))
        self._store = HostRows(layout, store)
        self._cached = rows is not None
        self.rows: Rows = self._store if rows is None else rows
        self._from = Ring(link[: shared.ring_bytes])
        self._to = Ring(link[ring : ring + shared.ring_bytes])
        self._results = np.frombuffer(link[2 * ring :], np.uint8)
        self._outputs = outputs
        # A parallel device answers from several threads, and a ring has one writer.
        self._lock = threading.Lock()

    def receive(self) -> list[Work]:
        """Batches in the ring; rows that are put are taken to the device on the way.

        Raises ProtocolError.
        """
        now = time.monotonic_ns()
        works = []
        for record in self._from.pop_all():
            message = wire.decode(record)
            if isinstance(message, wire.Run):
                works.append(Work(self, message, now))
            elif isinstance(message, wire.Put) and message.source.rows and self._cached:
                check_slots(message.source, self._store.slots)
                check_slots(message.cache, self.rows.slots)
                self.rows.put(message.cache, self._store.view(message.source))
            else:
                raise ProtocolError(f"a {type(message).__name__} in the ring")
        return works

    def answer(
        self, run: wire.Run, pieces: Sequence[Sequence[Array]], compute_ns: Sequence[int], queue_ns: int
    ) -> None:
        """Write the outputs where the gateway wants them, and ring."""
        starts, size = result_offsets(self._outputs, len(compute_ns) * run.rows)
        at, results = run.result_offset, self._results
        if at + size > len(results):
            self.fail(run, wire.FailureCode.BAD_REQUEST, "the results would lie beyond the arena")
            return
        for position, start in enumerate(starts):
            begin = at + start
            for piece in pieces:
                raw = piece[position].reshape(-1).view(np.uint8)
                results[begin : begin + len(raw)] = raw
                begin += len(raw)
        self._send(wire.encode_result(run.batch, queue_ns, compute_ns))

    def fail(self, run: wire.Run, code: wire.FailureCode, text: str) -> None:
        """Say that a batch could not be run."""
        self._send(wire.encode_failed(run.batch, code, text))

    def _send(self, record: bytes) -> None:
        with self._lock:
            if self.gone:
                return
            try:
                # There is room for the answers to all batches that its credits allow.
                reason = "" if self._to.push(record) else "it does not read its ring"
                os.eventfd_write(self._gateway_doorbell, 1)
            except BlockingIOError:
                return
            except (OSError, ProtocolError, ValueError) as error:
                # ValueError: its ring is too small for this answer.
                reason = str(error)
            if not reason:
                return
            self.gone = True
        _LOG.warning("gateway %s broke the protocol and is dropped: %s", self.name, reason)
        self._on_gone()

    def close(self) -> None:
        """Let go of the gateway's memory and doorbells, also where work of its own still refers to it."""
        with self._lock:
            self.gone = True
            self.rows = NoRows()
            self._results = np.empty(0, np.uint8)
            del self._store, self._from, self._to
            os.close(self.doorbell)
            os.close(self._gateway_doorbell)
