"""The link to a worker in another pod: a DEALER to the worker's ROUTER, by IP address, with CURVE where keys are given.

libzmq resolves names in its I/O thread and stalls every socket on a bad answer, so names are resolved by `resolver` on
every (re)connection; of several addresses each is tried in turn. The socket's descriptor is edge-triggered: after every
receive and send its events are looked at again (ZeroMQ guide, chapter "Sockets and Patterns"; `ZMQ_FD` in
zmq_getsockopt(3)).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import parse_monitor_message

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.keys import KeyFiles
from ensemble_contract.plan import WorkerAddress
from ensemble_contract.tensors import rows_of
from ensemble_gateway.batches import Batch
from ensemble_gateway.links import HEARTBEAT_S, SILENCE_S, LinkOwner, check_state, check_times
from ensemble_gateway.links.cache import CacheMap, Pinned, freed_ranges
from ensemble_gateway.links.resolver import Resolver
from ensemble_gateway.rowstore import RowStore

_LOG = logging.getLogger(__name__)

RECONNECT_S = 1.0
# How long a goodbye may take after its socket was closed.
GOODBYE_MS = 200
# Frames below this are cheaper to copy than to share with libzmq's I/O thread.
COPY_BELOW = 64 << 10

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class ZeroMQLink:
    """One worker, by its `tcp://HOST:PORT`."""

    def __init__(
        self, worker: WorkerAddress, store: RowStore, gateway: str, owner: LinkOwner,
        context: zmq.Context[zmq.Socket[bytes]], resolver: Resolver, keys: Callable[[], KeyFiles | None],
    ) -> None:  # fmt: skip
        self.worker = worker.name
        self.connected = False
        self._address = urlsplit(worker.address)
        self._store = store
        self._outputs = store.output_specs
        self._gateway = gateway
        self._owner = owner
        self._context = context
        self._resolver = resolver
        self._keys = keys
        self._attempts = 0
        self._trouble = ""
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._cache: CacheMap | None = None
        self._cache_rows = 0
        self._put_with_run = False
        self._in_flight: dict[int, tuple[int, int, Pinned]] = {}
        self._blocked: deque[Batch] = deque()
        self._heard_at = 0.0
        self._connecting: asyncio.Task[None] | None = None
        self._beat: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Resolve the worker's name and connect."""
        self._connecting = self._loop.create_task(self._connect())

    def send(self, batch: Batch) -> None:
        """Send a batch, and before it the rows that the worker does not have yet."""
        if self._socket is None or self._cache is None:
            return
        if self._blocked or not self._send(self._socket, self._cache, batch):
            self._blocked.append(batch)

    def flush(self) -> None:
        """Sending has reset the descriptor's edge: look whether something has come meanwhile."""
        if self._socket is not None and _readable(self._socket):
            self._loop.call_soon(self._drain)

    def forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These slots of the store are free again."""
        if self._cache is not None:
            self._cache.forget(ranges)

    def reset(self, reason: str, *, blame: bool = True) -> None:
        """Drop the socket, tell the owner if the worker was there, and connect anew."""
        connected = self.connected
        self._drop()
        self._warn(f"{'is lost' if connected else 'cannot be used'}: {reason}")
        if not self._closed:
            self._beat = self._loop.call_later(RECONNECT_S, self.start)
        if connected:
            self._owner.worker_lost(self.worker, reason, blame=blame, well_until=self._heard_at + HEARTBEAT_S)
            self._owner.settled()

    def close(self) -> None:
        """Say goodbye and release the socket."""
        self._closed = True
        self._drop()

    def _warn(self, trouble: str) -> None:
        """Log what is wrong, once: a worker that is away is tried every second."""
        if trouble != self._trouble:
            self._trouble = trouble
            _LOG.warning("worker %s %s", self.worker, trouble)

    def _send(self, sock: zmq.Socket[bytes], cache: CacheMap, batch: Batch) -> bool:
        """Send a batch; False, and nothing is sent, while rows on their way fill the worker's cache."""
        placement = cache.place(batch.ranges)
        if placement is None:
            return False
        frames: list[bytes | memoryview] = []
        if placement.missing_cache:
            frames = [wire.encode_put(placement.missing_cache), *self._rows(placement.missing_store)]
            if not self._put_with_run:
                _tell(sock, frames)
                frames = []
        self._in_flight[batch.id] = (len(batch.instances), batch.rows, placement.pinned)
        instances = [one.id for one in batch.instances]
        frames.append(wire.encode_run(batch.id, instances, batch.rows, 0, placement.rows))
        _tell(sock, frames)
        return True

    def _send_blocked(self, sock: zmq.Socket[bytes], cache: CacheMap) -> None:
        while self._blocked and self._send(sock, cache, self._blocked[0]):
            cache.forget(freed_ranges(self._blocked.popleft()))

    def _rows(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return [rows.reshape(-1).view("u1").data for rows in self._store.read(ranges)]

    async def _connect(self) -> None:
        host, port = self._address.hostname or "", self._address.port or 0
        try:
            found = await self._resolver.resolve(host)
        except (OSError, UnicodeError) as error:
            self._warn(f"cannot be used: its name {host} cannot be resolved: {error}")
            if not self._closed:
                self._beat = self._loop.call_later(RECONNECT_S, self.start)
            return
        if self._closed:
            return
        ip = found[self._attempts % len(found)]
        self._attempts += 1
        try:
            self._open(f"tcp://[{ip}]:{port}" if ":" in ip else f"tcp://{ip}:{port}")
        except (OSError, zmq.ZMQError) as error:
            self.reset(f"no connection can be opened: {error}")

    def _open(self, endpoint: str) -> None:
        self._socket = sock = self._context.socket(zmq.DEALER)
        sock.linger = 0
        sock.sndhwm = sock.rcvhwm = 0
        sock.ipv6 = True
        # A new identity for every connection: what a former one still had under way cannot be mistaken.
        sock.identity = f"{self._gateway}/{uuid.uuid4().hex[:12]}".encode()
        # All members' rows of one output may come in one frame.
        largest = wire.MAX_INSTANCES * self._store.layout.slots * max(spec.row_bytes for spec in self._outputs)
        sock.setsockopt(zmq.MAXMSGSIZE, min(wire.MAX_FRAME_BYTES + largest, (1 << 63) - 1))
        keys = self._keys()
        if keys is not None:
            sock.curve_publickey, sock.curve_secretkey = keys.own_public, keys.own_secret
            sock.curve_serverkey = keys.peer_public
        self._monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED | _REFUSED)
        sock.connect(endpoint)
        self._heard_at = self._loop.time()
        self._loop.add_reader(sock.fileno(), self._drain)
        self._loop.add_reader(self._monitor.fileno(), self._monitored)
        _tell(sock, [wire.encode_control(wire.Hello(self._gateway))])
        self._beat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)
        self._monitored()
        self.flush()

    def _drop(self) -> None:
        self._cache, self.connected = None, False
        self._in_flight.clear()
        self._blocked.clear()
        if self._beat is not None:
            self._beat.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        sock, monitor, self._socket, self._monitor = self._socket, self._monitor, None, None
        if sock is not None:
            self._loop.remove_reader(sock.fileno())
            # A worker that hears it drops the rows at once; one that is gone holds nothing up.
            with contextlib.suppress(zmq.ZMQError):
                sock.send(wire.BYE, zmq.NOBLOCK)
            # Before its peer is closed: libzmq waits until an event can be sent.
            sock.disable_monitor()
            sock.close(GOODBYE_MS)
        if monitor is not None:
            self._loop.remove_reader(monitor.fileno())
            monitor.close(0)

    def _heartbeat(self) -> None:
        if self._socket is None:
            return
        if self._loop.time() - self._heard_at > SILENCE_S:
            self.reset(f"nothing was heard from it for {SILENCE_S:.0f} s")
            return
        _tell(self._socket, [wire.PING])
        self._beat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)
        self.flush()

    def _monitored(self) -> None:
        """The TCP connection ended: faster than waiting for silence. The guest that a worker refuses learns why."""
        while self._monitor is not None and _readable(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event & _REFUSED:
                self.reset("the handshake failed: both sides need CURVE, and each the other's public key, or neither")
            elif self.connected:
                self._drain()
                if self.connected:
                    self.reset("its connection has ended")

    def _drain(self) -> None:
        told = False
        try:
            while self._socket is not None and _readable(self._socket):
                self._take(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
                told = True
        except ProtocolError as error:
            self.reset(f"it broke the protocol: {error}")
            return
        if told:
            self._owner.settled()

    def _take(self, frames: list[zmq.Frame]) -> None:
        self._heard_at = self._loop.time()
        message = wire.decode(frames[0].buffer)
        match message:
            case wire.Ping():
                return
            case wire.State():
                self._learn(message)
            case wire.Bye():
                self.reset("it has left, or does not know this gateway", blame=False)
            case wire.Result() | wire.Failed():
                self._answered(message, frames[1:])
            case _:
                raise ProtocolError(f"a {type(message).__name__} from a worker")

    def _learn(self, state: wire.State) -> None:
        if state.cache_rows < 1:
            raise ProtocolError("a State without room for rows")
        check_state(state, self.worker, self._cache_rows if self.connected else None)
        self.connected = True
        self._put_with_run = state.put_with_run
        self._attempts, self._trouble = 0, ""
        if self._cache is None:
            self._cache_rows = state.cache_rows
            self._cache = CacheMap(self._store.layout.slots, state.cache_rows)
        self._owner.worker_state(state)

    def _answered(self, message: wire.Result | wire.Failed, frames: list[zmq.Frame]) -> None:
        flight = self._in_flight.pop(message.batch, None)
        if flight is None or self._cache is None:
            raise ProtocolError(f"batch {message.batch} was not asked for")
        many, rows, pinned = flight
        self._cache.unpin(pinned)
        if isinstance(message, wire.Failed):
            self._owner.worker_failed(message)
        else:
            check_times(message, many)
            if len(frames) != len(self._outputs):
                raise ProtocolError(f"a RESULT of {len(frames)} outputs, not {len(self._outputs)}")
            try:
                outputs = [
                    rows_of(frame.buffer, spec, many * rows).reshape(many, rows, *spec.shape)
                    for frame, spec in zip(frames, self._outputs, strict=True)
                ]
            except ValueError as error:
                raise ProtocolError(str(error)) from error
            self._owner.worker_result(message, outputs)
        if self._blocked and self._socket is not None:
            self._send_blocked(self._socket, self._cache)


def _tell(sock: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> None:
    """Send a message; there is no limit on how many wait.

    A peer that was refused or that broke ZMTP has no queue any more, maybe before the first message: what is told to it
    then is lost, and the monitor's event, which is on its way, resets the link.
    """
    with contextlib.suppress(zmq.Again):
        sock.send_multipart(frames, zmq.NOBLOCK, copy=sum(map(len, frames)) < COPY_BELOW)


def _readable(sock: zmq.Socket[bytes]) -> bool:
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
