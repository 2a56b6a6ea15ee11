"""Gateways on the same machine: rows, descriptors and results in shared memory, eventfds as doorbells.

A gateway connects to the Unix socket and passes four descriptors with its Hello: its row store, the link's memory (rings
and results) and the two doorbells. The store is mapped for reading only: a worker cannot damage it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.layout import StoreLayout, aligned, result_offsets
from ensemble_contract.ring import Ring
from ensemble_contract.tensors import TensorSpec

from ensemble_worker.gather import HostRows
from ensemble_worker.links import Rows, RowsMaker, StateMaker, Work

_LOG = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


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
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
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
        for fd, _ in self._epoll.poll(-1 if block else 0):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                self._bury()
                continue
            peer = self._peers.get(fd)
            if peer is not None:
                try:
                    works += peer.receive()
                except ProtocolError as error:
                    _LOG.warning("gateway %s broke the protocol and is dropped: %s", peer.name, error)
                    peer.gone = True
                    self._bury()
        return works

    def wake(self) -> None:
        """Make a waiting `receive` return."""
        os.eventfd_write(self._wake, 1)

    def broadcast(self) -> None:
        """Tell every gateway the State again."""
        living = [peer for peer in list(self._peers.values()) if not peer.gone]
        message = wire.encode_control(self._state_for(len(living), self._cache_rows))
        for peer in living:
            with contextlib.suppress(OSError):
                peer.sock.send(message)

    def close(self) -> None:
        """Say goodbye and stop accepting; the executor has ended."""
        if self._loop is not None:
            self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for peer in self._peers.values():
            if self._loop is not None:
                self._loop.remove_reader(peer.sock.fileno())
            with contextlib.suppress(OSError):
                peer.sock.send(wire.BYE)
            peer.close()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        if self._loop is not None:
            self._loop.add_reader(sock.fileno(), self._greet, sock)

    def _greet(self, sock: socket.socket) -> None:
        """The first packet of a connection: Hello with its descriptors."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(sock.fileno())
        fds: list[int] = []
        try:
            packet, fds, _, _ = socket.recv_fds(sock, wire.MAX_CONTROL_BYTES + 64, 4)
            peer = self._welcome(sock, packet, fds)
        except (OSError, ProtocolError, ValueError) as error:
            _LOG.warning("a connection that is not a gateway's was closed: %s", error)
            sock.close()
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            return
        self._peers[peer.doorbell] = peer
        self._epoll.register(peer.doorbell, select.EPOLLIN)
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
        rows = self._make_rows(self._cache_rows) if self._make_rows is not None else None
        return SharedPeer(message.gateway, sock, fds, shared, layout, self._outputs, rows)

    def _hear(self, peer: SharedPeer) -> None:
        """Gateways say nothing more here but goodbye; the end of the connection says the same."""
        try:
            packet = peer.sock.recv(wire.MAX_CONTROL_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet or packet == wire.BYE:
            asyncio.get_running_loop().remove_reader(peer.sock.fileno())
            peer.gone = True
            self.wake()

    def _bury(self) -> None:
        """Drop gateways that are gone. Done by the executor, which alone uses their memory and doorbells."""
        gone = [peer for peer in self._peers.values() if peer.gone]
        for peer in gone:
            self._epoll.unregister(peer.doorbell)
            del self._peers[peer.doorbell]
            peer.close()
        if gone and self._loop is not None:
            self._loop.call_soon_threadsafe(self.broadcast)


class SharedPeer:
    """One gateway on the same machine."""

    def __init__(
        self, name: str, sock: socket.socket, fds: list[int], shared: wire.SharedLayout,
        layout: StoreLayout, outputs: tuple[TensorSpec, ...], rows: Rows | None,
    ) -> None:  # fmt: skip
        store_fd, link_fd, self.doorbell, self._gateway_doorbell = fds
        self.name = name
        self.sock = sock
        self.gone = False
        ring = aligned(shared.ring_bytes, mmap.PAGESIZE)
        store = memoryview(mmap.mmap(store_fd, shared.store_bytes, access=mmap.ACCESS_READ))
        link = memoryview(mmap.mmap(link_fd, 2 * ring + shared.arena_bytes))
        os.close(store_fd)
        os.close(link_fd)
        self._store = HostRows(layout, store)
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
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.doorbell)
        now = time.monotonic_ns()
        works = []
        for record in self._from.pop_all():
            message = wire.decode(record)
            if isinstance(message, wire.Run):
                works.append(Work(self, message, now))
            elif isinstance(message, wire.Put) and message.source.rows:
                self.rows.put(message.cache, self._store.view(message.source))
            else:
                raise ProtocolError(f"a {type(message).__name__} in the ring")
        return works

    def answer(self, run: wire.Run, outputs: Sequence[Array], compute_ns: int, queue_ns: int) -> None:
        """Write the outputs where the gateway wants them, and ring."""
        starts, size = result_offsets(self._outputs, run.rows)
        at = run.result_offset
        if at + size > len(self._results):
            self.fail(run, wire.FailureCode.BAD_REQUEST, "the results would lie beyond the arena")
            return
        for start, output in zip(starts, outputs, strict=True):
            raw = output.reshape(-1).view(np.uint8)
            self._results[at + start : at + start + len(raw)] = raw
        self._send(wire.encode_result(run.batch, compute_ns, queue_ns))

    def fail(self, run: wire.Run, code: wire.FailureCode, text: str) -> None:
        """Say that a batch could not be run."""
        self._send(wire.encode_failed(run.batch, code, text))

    def _send(self, record: bytes) -> None:
        if self.gone:
            return
        with self._lock:
            while not self._to.push(record):
                if self.gone:
                    return
                # A gateway that does not read its ring has at most its credits in it: this is a few records' wait.
                time.sleep(0.001)
        os.eventfd_write(self._gateway_doorbell, 1)

    def close(self) -> None:
        """Let go of the gateway's memory and doorbells."""
        self.sock.close()
        os.close(self.doorbell)
        os.close(self._gateway_doorbell)
