"""The other end of a link in the test's own hands: gateways and workers that say whatever the test wants."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import zmq

from ensemble_contract import wire
from ensemble_contract.keys import KeyFiles
from ensemble_contract.layout import StoreLayout
from ensemble_contract.plan import WorkerAddress
from ensemble_contract.ring import HEADER_BYTES, Ring
from ensemble_gateway.links.memory import SharedMemory
from ensemble_gateway.links.resolver import Resolver, addresses_of
from ensemble_gateway.links.shared import SharedLink
from ensemble_gateway.links.zeromq import ZeroMQLink
from tests.support.link_members import INPUTS
from tests.support.link_pairs import DEADLINE_S, NAME, Gateway, NumpyWorker, free_port

RING = HEADER_BYTES + 4096
ARENA = 1 << 16


def shared_link(path: Path) -> Callable[[Gateway], SharedLink]:
    def make(owner: Gateway) -> SharedLink:
        return SharedLink(NAME, str(path), owner.memory, owner.store, "gateway", owner)

    return make


Linker = Callable[..., Callable[[Gateway], ZeroMQLink]]


@contextlib.contextmanager
def zeromq_links(sockets: int = 1023) -> Iterator[Linker]:
    """Makes links to an address, all in one ZeroMQ context of at most so many sockets."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, sockets)

    def link_to(
        address: str,
        keys: KeyFiles | Callable[[], KeyFiles] | None = None,
        lookup: Callable[[str], list[str]] = addresses_of,
    ) -> Callable[[Gateway], ZeroMQLink]:
        def keys_now() -> KeyFiles | None:
            return keys() if callable(keys) else keys

        def make(owner: Gateway) -> ZeroMQLink:
            worker = WorkerAddress(NAME, address)
            return ZeroMQLink(worker, owner.store, "gateway", owner, context, Resolver(lookup), keys_now)

        return make

    yield link_to
    context.term()


@pytest.fixture
def linker() -> Iterator[Linker]:
    """For links of one test."""
    with zeromq_links() as links:
        yield links


@pytest.fixture
def address() -> str:
    """Where a worker can listen."""
    return f"tcp://127.0.0.1:{free_port()}"


def state(cache_rows: int = 0, **more: object) -> bytes:
    fields = {
        "worker": NAME,
        "generation": 1,
        "instances": (),
        "serial": True,
        "credits": 1,
        "cache_rows": cache_rows,
        **more,
    }
    return wire.encode_control(wire.State(**fields))  # type: ignore[arg-type]


def run_of(many: int, *, claimed: int) -> bytes:
    """A RUN of one row with the ids of `many` instances, which claims to have `claimed`."""
    record = wire.encode_run(7, [1], 1, 0, [(0, 1)])
    return (
        record[:16] + struct.pack("<I", claimed) + record[20:32] + struct.pack(f"<{many}I", *range(many)) + record[36:]
    )


def result_of(batch: int, many: int, *, claimed: int) -> bytes:
    """A RESULT with the times of `many` instances, which claims to have `claimed`."""
    record = wire.encode_result(batch, 1, [1])
    return record[:4] + struct.pack("<I", claimed) + record[8:24] + bytes(8 * many)


HOSTILE_RUNS = {
    "a run of no instance": run_of(0, claimed=0),
    "a run of 65 instances": run_of(65, claimed=65),
    "a run of 4 billion instances": run_of(1, claimed=0xFFFF_FFFF),
    "a run of fewer instances than it says": run_of(1, claimed=2),
    "a run of more instances than it says": run_of(3, claimed=1),
}


async def goes_on(worker: NumpyWorker, owner: Gateway) -> None:
    """The gateway beside the stranger never noticed, and has the worker for itself again."""
    await owner.until(lambda: worker.gateways == 1)
    await owner.run(20)
    assert owner.lost == []


class SharedStranger:
    """A gateway's socket in our own hands."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(str(path))
        layout = StoreLayout(INPUTS, 64)
        self.shared = wire.SharedLayout(layout.total_bytes, 64, RING, ARENA)
        self.store = SharedMemory("stranger-store", layout.total_bytes)
        self.memory = SharedMemory("stranger-link", 2 * 8192 + ARENA)
        self.bells = [os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)]
        self.to_worker = Ring(self.memory.memory[:RING])
        self.from_worker = Ring(self.memory.memory[8192 : 8192 + RING])

    def greet(self, descriptors: list[int] | None = None, shared: wire.SharedLayout | None = None) -> None:
        hello = wire.encode_control(wire.Hello("stranger", shared=shared or self.shared))
        fds = descriptors if descriptors is not None else [self.store.fd, self.memory.fd, *self.bells]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([hello], ancillary)

    async def welcome(self) -> wire.Message:
        return wire.decode(await asyncio.to_thread(self.sock.recv, 1 << 20))

    def write(self, *records: bytes) -> None:
        for record in records:
            assert self.to_worker.push(record)
        os.eventfd_write(self.bells[0], 1)

    async def is_dropped(self) -> None:
        while await asyncio.to_thread(self.sock.recv, 1 << 20):
            pass

    async def answer(self) -> wire.Message:
        async with asyncio.timeout(DEADLINE_S):
            while not (records := self.from_worker.pop_all()):
                await asyncio.sleep(0.002)
        return wire.decode(records[0])

    def close(self) -> None:
        self.sock.close()
        for bell in self.bells:
            os.close(bell)
        self.store.close()
        self.memory.close()


@contextlib.contextmanager
def shared_stranger(path: Path) -> Iterator[SharedStranger]:
    made = SharedStranger(path)
    try:
        yield made
    finally:
        made.close()


@contextlib.asynccontextmanager
async def false_shared_worker(path: Path, *packets: bytes) -> AsyncIterator[list[list[int]]]:
    """Listens where a worker should, and says these things to whoever greets it; yields the descriptors it got."""
    loop = asyncio.get_running_loop()
    got: list[list[int]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)

        async def serve() -> None:
            while True:
                sock, _ = await loop.sock_accept(listener)
                sock.setblocking(True)
                sock.settimeout(DEADLINE_S)
                _, fds, _, _ = await asyncio.to_thread(socket.recv_fds, sock, 1 << 20, 4)
                for packet in packets:
                    sock.send(packet)
                kept.append(sock)
                got.append(fds)

        kept: list[socket.socket] = []
        serving = asyncio.create_task(serve())
        try:
            yield got
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            for sock in kept:
                sock.close()
            for fds in got:
                for fd in fds:
                    os.close(fd)
    path.unlink()


class FalseWorker:
    """A ROUTER in our own hands."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sock = self.context.socket(zmq.ROUTER)
        self.sock.linger = 0
        self.sock.bind(address)

    async def hear(self, kind: type[wire.Message]) -> bytes:
        """The identity of the next gateway that sends such a message."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self.sock.poll(0):
                frames = self.sock.recv_multipart()
                if isinstance(wire.decode(frames[1]), kind):
                    return frames[0]
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} within {DEADLINE_S} s")

    def close(self) -> None:
        self.sock.close(0)
        self.context.term()


@contextlib.contextmanager
def false_worker(address: str) -> Iterator[FalseWorker]:
    made = FalseWorker(address)
    try:
        yield made
    finally:
        made.close()


class ZeroMQStranger:
    """A DEALER in our own hands."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sock = self.context.socket(zmq.DEALER)
        self.sock.linger = 0
        self.sock.connect(address)

    async def hear(self, kind: type[wire.Message]) -> list[bytes]:
        """The frames of the next message of this kind."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self.sock.poll(0):
                frames = self.sock.recv_multipart()
                if isinstance(wire.decode(frames[0]), kind):
                    return frames
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} within {DEADLINE_S} s")

    async def greet(self) -> None:
        self.sock.send(wire.encode_control(wire.Hello("stranger")))
        await self.hear(wire.State)

    def close(self) -> None:
        self.sock.close(0)
        self.context.term()


@contextlib.contextmanager
def zeromq_stranger(address: str) -> Iterator[ZeroMQStranger]:
    made = ZeroMQStranger(address)
    try:
        yield made
    finally:
        made.close()
