"""Gateways in other pods: a ROUTER socket, with CURVE and an admitted client key (ZAP, RFC 27) where keys are given.

Two threads use the socket, each under the lock (libzmq allows that with a full fence between; zmq(7), "Thread safety"):
the executor receives and answers, the control thread sends heartbeats and States. A send may swallow the edge of the
socket's descriptor, so whoever has sent wakes the executor if something has come meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.keys import KeyFiles
from ensemble_contract.tensors import TensorSpec, rows_of
from ensemble_worker.links import NoRows, Rows, RowsMaker, StateMaker, Work, check_slots

_LOG = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

HEARTBEAT_S = 1.0
SILENCE_S = 10.0
COPY_BELOW = 64 << 10
# Messages that are taken in one go: a gateway that never stops talking shall not keep the others' batches waiting.
MESSAGES_AT_ONCE = 256


class ZeroMQServer:
    """Accepts gateways at `tcp://HOST:PORT`; each may keep `cache_rows` rows in a cache that `make_rows` makes."""

    def __init__(
        self, address: str, inputs: Sequence[TensorSpec], state_for: StateMaker,
        make_rows: RowsMaker, cache_rows: int, keys: KeyFiles | None = None,
    ) -> None:  # fmt: skip
        self._address = address
        self._inputs = tuple(inputs)
        self._state_for = state_for
        self._make_rows = make_rows
        self._cache_rows = cache_rows
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._authenticator: ThreadAuthenticator | None = None
        self._lock = threading.Lock()
        self._peers: dict[bytes, ZeroMQPeer] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._beat: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Bind. Raises OSError if the address cannot be bound."""
        sock = self._socket
        sock.linger = 0
        sock.sndhwm = sock.rcvhwm = 0
        sock.ipv6 = True
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # libzmq ends a connection before it takes memory for more than a cache full of one input.
        largest = self._cache_rows * max(spec.row_bytes for spec in self._inputs)
        sock.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES + largest)
        if self._keys is not None:
            self._admit_listed(self._keys)
        try:
            sock.bind(self._address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"{self._address}: {error.strerror}") from error
        self._poll.register(sock.fileno(), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        self._loop = asyncio.get_running_loop()
        self._beat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)

    def _admit_listed(self, keys: KeyFiles) -> None:
        """CURVE alone lets anyone in who knows the server's public key: only the gateways' key is admitted."""
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="ensemble", credentials_provider=_Listed(keys.peer_public))
        self._socket.zap_domain = b"ensemble"
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.own_public, keys.own_secret

    def receive(self, block: bool) -> list[Work]:
        """Batches that have come, after rows were put into the caches."""
        works, more = self._drain()
        if works or more or not block:
            return works
        # In milliseconds; an edge that was lost all the same costs no more than this.
        for fd, _ in self._poll.poll(1000):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
        return self._drain()[0]

    def wake(self) -> None:
        """Make a waiting `receive` return."""
        os.eventfd_write(self._wake, 1)

    def broadcast(self) -> None:
        """Tell every gateway the State again."""
        peers = list(self._peers)
        message = wire.encode_control(self._state_for(len(peers), self._cache_rows))
        for identity in peers:
            self.send([identity, message])

    def close(self) -> None:
        """Say goodbye and release the socket; the executor has ended."""
        if self._beat is not None:
            self._beat.cancel()
        for identity in list(self._peers):
            self.send([identity, wire.BYE])
        self._peers.clear()
        with self._lock:
            self._socket.close(linger=200)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        os.close(self._wake)

    def send(self, frames: Sequence[Any]) -> None:
        """Send one message; from any thread."""
        size = sum(len(frame) for frame in frames)
        with self._lock, contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=size < COPY_BELOW)
            if self._readable():
                self.wake()

    def _drain(self) -> tuple[list[Work], bool]:
        """Batches that have come, and whether there may be more."""
        works: list[Work] = []
        for _ in range(MESSAGES_AT_ONCE):
            with self._lock:
                if not self._readable():
                    return works, False
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            try:
                self._take(frames, works)
            except ProtocolError as error:
                identity = frames[0].bytes
                _LOG.warning("gateway %r broke the protocol and is dropped: %s", identity[:64], error)
                self._drop(identity)
        return works, True

    def _take(self, frames: list[zmq.Frame], works: list[Work]) -> None:
        identity = frames[0].bytes
        if len(frames) < 2:
            raise ProtocolError("an empty message")
        message = wire.decode(frames[1].buffer)
        peer = self._peers.get(identity)
        if isinstance(message, wire.Hello):
            self._welcome(identity)
            return
        if peer is None:
            if not isinstance(message, wire.Bye):
                self.send([identity, wire.BYE])
            return
        peer.heard_at = time.monotonic()
        match message:
            case wire.Run():
                works.append(Work(peer, message, time.monotonic_ns()))
            case wire.Put():
                run = peer.put(message, frames[2:])
                if run is not None:
                    works.append(Work(peer, run, time.monotonic_ns()))
            case wire.Bye():
                self._drop(identity)
            case wire.Ping():
                pass
            case _:
                raise ProtocolError(f"a {type(message).__name__} from a gateway")

    def _welcome(self, identity: bytes) -> None:
        self._peers[identity] = ZeroMQPeer(identity, self, self._inputs, self._make_rows(self._cache_rows))
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.broadcast)

    def _drop(self, identity: bytes) -> None:
        peer = self._peers.pop(identity, None)
        if peer is not None:
            peer.rows = NoRows()
            self.send([identity, wire.BYE])
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.broadcast)

    def _heartbeat(self) -> None:
        now = time.monotonic()
        for identity, peer in list(self._peers.items()):
            if now - peer.heard_at > SILENCE_S:
                self._drop(identity)
            else:
                self.send([identity, wire.PING])
        if self._loop is not None:
            self._beat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)

    def _readable(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class ZeroMQPeer:
    """One gateway in another pod."""

    def __init__(self, identity: bytes, server: ZeroMQServer, inputs: tuple[TensorSpec, ...], rows: Rows) -> None:
        self.heard_at = time.monotonic()
        self.rows: Rows = rows
        self._identity = identity
        self._server = server
        self._inputs = inputs

    def put(self, message: wire.Put, frames: Sequence[zmq.Frame]) -> wire.Run | None:
        """Take rows into the cache, and give the Run that ends the message.

        Raises ProtocolError if the frames are not these rows and maybe a Run.
        """
        many = len(self._inputs)
        tensors, rest = frames[:many], frames[many:]
        if len(tensors) != many or len(rest) > 1 or message.source.rows:
            raise ProtocolError(f"a PUT of {len(frames)} tensors, not {many}")
        check_slots(message.cache, self.rows.slots)
        run = wire.decode(rest[0].buffer) if rest else None
        if run is not None and not isinstance(run, wire.Run):
            raise ProtocolError(f"a {type(run).__name__} after the rows of a PUT")
        try:
            arrays = [rows_of(f.buffer, s, message.cache.rows) for f, s in zip(tensors, self._inputs, strict=True)]
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        self.rows.put(message.cache, arrays)
        return run

    def answer(
        self, run: wire.Run, pieces: Sequence[Sequence[Array]], compute_ns: Sequence[int], queue_ns: int
    ) -> None:
        """Send a batch's outputs, one frame each, with all its instances one after the other."""
        frames = []
        for parts in zip(*pieces, strict=True):
            flat = [part.reshape(-1) for part in parts]
            whole = flat[0] if len(flat) == 1 else np.concatenate(flat)
            frames.append(whole.view(np.uint8).data)
        self._server.send([self._identity, wire.encode_result(run.batch, queue_ns, compute_ns), *frames])

    def fail(self, run: wire.Run, code: wire.FailureCode, text: str) -> None:
        """Say that a batch could not be run."""
        self._server.send([self._identity, wire.encode_failed(run.batch, code, text)])


class _Listed:
    """Admits one client key."""

    def __init__(self, admitted: bytes) -> None:
        self._admitted = admitted

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this client may connect."""
        return domain == "ensemble" and key == self._admitted
