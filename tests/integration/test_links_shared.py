"""The link in shared memory: gateway and worker with a real socket, real rings, real descriptors."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import mmap
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout
from ensemble_contract.ring import HEADER_BYTES, Ring
from ensemble_gateway.links import shared
from ensemble_gateway.links.shared import ARENA_BYTES, RING_BYTES, SharedLink, SharedMemory
from tests.support.link_pairs import (
    BATCH_ROWS,
    BIG_INPUTS,
    DEADLINE_S,
    INPUTS,
    NAME,
    Gateway,
    NumpyWorker,
    gateway,
    mapped,
    open_descriptors,
    running,
    worker_at,
    worker_process,
)

RING = HEADER_BYTES + 4096
ARENA = 1 << 16


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, for a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        yield Path(folder) / "data.sock"


def link_to(path: Path) -> Callable[[Gateway], SharedLink]:
    def make(owner: Gateway) -> SharedLink:
        return SharedLink(NAME, str(path), owner.memory, owner.store, "gateway", owner)

    return make


async def test_thousands_of_batches_of_random_ranges(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")), gateway(link_to(path)) as owner:
        await owner.run(3000, cancel=0.2)
        assert owner.checked_rows > 20_000
        assert owner.lost == []


async def test_gateways_share_a_worker(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, contextlib.AsyncExitStack() as stack:
        owners = [await stack.enter_async_context(gateway(link_to(path), seed=seed)) for seed in range(4)]
        await asyncio.gather(*(owner.run(400, cancel=0.1) for owner in owners))
        assert worker.gateways == 4
        assert [owner.lost for owner in owners] == [[]] * 4


async def test_big_rows(path: Path) -> None:
    async with (
        running(worker_at(f"unix:{path}", inputs=BIG_INPUTS)),
        gateway(link_to(path), slots=48, inputs=BIG_INPUTS) as owner,
    ):
        await owner.run(60, most_rows=16)


async def test_device_with_a_cache_smaller_than_the_store(path: Path) -> None:
    worker = worker_at(f"unix:{path}", cache_rows=2 * BATCH_ROWS, copies=True)
    async with running(worker), gateway(link_to(path), slots=1024) as owner:
        await owner.run(1500, in_flight=12, cancel=0.3)
        assert owner.lost == []


async def test_more_batches_than_the_ring_has_room_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds no room waits; it is not lost and does not end the link."""
    monkeypatch.setattr(shared, "RING_BYTES", RING)
    async with running(worker_at(f"unix:{path}")), gateway(link_to(path), slots=4096) as owner:
        for _ in range(80):
            owner.send(*[1, 2] * (BATCH_ROWS // 3), flush=False)
        assert 80 * 8 * 2 * (BATCH_ROWS // 3) > 3 * RING
        assert owner.link is not None
        owner.link.flush()
        await owner.until(lambda: owner.answered == 80)
        assert owner.wrong == []


async def test_slots_are_reused_while_batches_are_in_flight(path: Path) -> None:
    """Rows given up under a running batch leave wrong rows nowhere but in their own, dead place."""
    worker = worker_at(f"unix:{path}", cache_rows=64, copies=True)
    async with running(worker), gateway(link_to(path), slots=64) as owner:
        for _ in range(100):
            worker.gate.clear()
            first = owner.send(3, 3, 3)
            assert first is not None
            for entry in first.entries[:2]:
                owner.free(entry.request)
            assert owner.send(2, 4) is not None
            worker.open_gate()
            await owner.until(lambda: not owner.in_flight)
        assert owner.wrong == []
        assert owner.checked_rows >= 100 * 9


async def test_worker_that_leaves_is_lost_once_and_found_again(path: Path) -> None:
    first = worker_at(f"unix:{path}")
    first.start()
    async with gateway(link_to(path)) as owner:
        await owner.run(20)
        first.stop()
        await owner.until(lambda: bool(owner.lost))
        await asyncio.sleep(0.3)
        assert owner.lost == ["it has left"]
        assert len(owner.states) == 1
        async with running(worker_at(f"unix:{path}")):
            await owner.until(lambda: len(owner.states) == 2)
            await owner.run(20)
        await owner.until(lambda: len(owner.lost) == 2)


async def test_killed_worker_is_lost_at_once_with_its_batches(path: Path) -> None:
    with worker_process(f"unix:{path}") as process:
        async with gateway(link_to(path)) as owner:
            await owner.run(50)
            process.kill()
            owner.send(5)
            await owner.until(lambda: bool(owner.lost), timeout_s=2)
            assert owner.lost == ["its process has ended"]
            with worker_process(f"unix:{path}"):
                await owner.until(lambda: len(owner.states) == 2)
                await owner.run(50)


async def test_gateway_that_leaves_frees_its_memory(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as staying:
        await staying.run(1)
        gc.collect()
        links, stores, descriptors = mapped("ensemble-link"), mapped("ensemble-store"), open_descriptors()
        for abrupt in (False, True):
            async with gateway(link_to(path)) as leaving:
                await leaving.run(5)
                assert worker.gateways == 2
                worker.gate.clear()
                leaving.send(4)
                if abrupt:
                    leaving.link._session.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
                    await leaving.until(lambda lost=leaving.lost: bool(lost))  # type: ignore[misc]
            del leaving
            worker.open_gate()
            await staying.until(lambda: worker.gateways == 1)
            await staying.run(5)
        gc.collect()
        assert (mapped("ensemble-link"), mapped("ensemble-store")) == (links, stores)
        assert open_descriptors() == descriptors


# -- hostile gateways ----------------------------------------------------------------------------------------------


class Stranger:
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
def stranger(path: Path) -> Iterator[Stranger]:
    made = Stranger(path)
    try:
        yield made
    finally:
        made.close()


async def goes_on(worker: NumpyWorker, owner: Gateway) -> None:
    """The gateway beside the stranger never noticed, and has the worker for itself again."""
    await owner.until(lambda: worker.gateways == 1)
    await owner.run(20)
    assert owner.lost == []


def run(rows: int, ranges: list[tuple[int, int]], at: int = 0) -> bytes:
    return wire.encode_run(7, 1, rows, at, ranges)


RING_GARBAGE = {
    "noise": [b"\xff" * 40],
    "no head": [b"EO"],
    "other version": [run(1, [(0, 1)]).replace(b"EO\x01", b"EO\x02")],
    "a state": [wire.encode_control(wire.State("x", 1, (), True, 1))],
    "a put where rows are read in place": [wire.encode_put([(0, 1)], [(0, 1)])],
    "good, then bad": [run(1, [(0, 1)]), b"????????"],
}


@pytest.mark.parametrize("records", RING_GARBAGE.values(), ids=RING_GARBAGE)
async def test_garbage_in_the_ring_drops_its_gateway_only(path: Path, records: list[bytes]) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.greet()
            assert isinstance(await other.welcome(), wire.State)
            other.write(*records)
            await other.is_dropped()
            await goes_on(worker, owner)
        async with gateway(link_to(path), seed=1) as later:
            await later.run(5)


@pytest.mark.parametrize(("position", "value"), [(0, 5), (0, 1 << 20), (0, (1 << 64) - 1), (8, 1 << 20), (8, 1 << 63)])
async def test_spoilt_positions_drop_their_gateway_only(path: Path, position: int, value: int) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.greet()
            await other.welcome()
            ring = other.memory.memory[:RING] if position == 0 else other.memory.memory[8192 : 8192 + RING]
            if position == 8:
                other.write(run(1, [(0, 1)]))
                ring[:HEADER_BYTES].cast("Q")[8] = value
                other.write(run(1, [(0, 1)]))
            else:
                ring[:HEADER_BYTES].cast("Q")[0] = value
                os.eventfd_write(other.bells[0], 1)
            await other.is_dropped()
            await goes_on(worker, owner)


async def test_a_cache_is_not_written_beyond_its_end(path: Path) -> None:
    worker = worker_at(f"unix:{path}", cache_rows=64, copies=True)
    async with running(worker), gateway(link_to(path)) as owner:
        for put in (
            wire.encode_put([(60, 5)], [(0, 5)]),
            wire.encode_put([(0, 5)], [(60, 5)]),
            wire.encode_put([(0, 65)], [(0, 1)] * 65),
            wire.encode_put([(0, 50)] * 2, [(0, 50)] * 2),
            wire.encode_put([(0, 5)]),
        ):
            with stranger(path) as other:
                other.greet()
                await other.welcome()
                other.write(put)
                await other.is_dropped()
                await goes_on(worker, owner)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (run(1, [(64, 1)]), "beyond slot 64"),
        (run(64, [((1 << 32) - 65, 64)]), "beyond slot 64"),
        (run(1, [(0, 1)], at=ARENA), "beyond the arena"),
        (run(1, [(0, 1)], at=(1 << 64) - 64), "beyond the arena"),
    ],
)
async def test_a_run_out_of_bounds_is_failed(path: Path, record: bytes, text: str) -> None:
    async with running(worker_at(f"unix:{path}")), gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.greet()
            await other.welcome()
            other.write(record)
            answer = await other.answer()
            assert isinstance(answer, wire.Failed)
            assert (answer.batch, answer.code) == (7, wire.FailureCode.BAD_REQUEST)
            assert text in answer.text
            await owner.run(20)


async def test_a_gateway_that_does_not_read_its_ring_is_dropped(path: Path) -> None:
    """It cannot make the others wait."""
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.greet()
            await other.welcome()
            dropped = asyncio.create_task(other.is_dropped())
            async with asyncio.timeout(DEADLINE_S):
                while not dropped.done():
                    other.to_worker.push(run(1, [(99, 1)]))
                    os.eventfd_write(other.bells[0], 1)
                    await asyncio.sleep(0)
            await goes_on(worker, owner)


def bad_hellos() -> dict[str, tuple[wire.SharedLayout, str]]:
    store = StoreLayout(INPUTS, 64).total_bytes
    good = wire.SharedLayout(store, 64, RING, ARENA)
    return {
        "no descriptors": (good, ""),
        "three descriptors": (good, "smb"),
        "a file for everything": (good, "ffff"),
        "memory that could shrink": (good, "ffbb"),
        "files for doorbells": (good, "smff"),
        "memory too small": (wire.SharedLayout(store, 64, RING, 1 << 40), "smbb"),
        "a ring of odd size": (wire.SharedLayout(store, 64, RING + 4, ARENA), "smbb"),
        "other inputs": (wire.SharedLayout(store + 4096, 64, RING, ARENA), "smbb"),
    }


@pytest.mark.parametrize(("layout", "what"), bad_hellos().values(), ids=bad_hellos())
async def test_a_hello_that_is_none_is_refused(path: Path, layout: wire.SharedLayout, what: str) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        gc.collect()
        before = open_descriptors()
        with stranger(path) as other, tempfile.TemporaryFile() as file:
            file.truncate(1 << 20)
            kinds = {"s": other.store.fd, "m": other.memory.fd, "b": other.bells[0], "f": file.fileno()}
            other.greet([kinds[kind] for kind in what], layout)
            await other.is_dropped()
        await goes_on(worker, owner)
        # A mapping has a descriptor of its own until nobody refers to it.
        del other
        gc.collect()
        assert open_descriptors() == before


@pytest.mark.parametrize(
    "noise", [b"?", b"\0" * 100_000, wire.PING, wire.encode_control(wire.Hello("remote"))], ids=range(4)
)
async def test_a_stranger_that_does_not_greet_is_refused(path: Path, noise: bytes) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.sock.send(noise)
            await other.is_dropped()
            await goes_on(worker, owner)


async def test_a_gateway_that_chatters_is_dropped(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(link_to(path)) as owner:
        with stranger(path) as other:
            other.greet()
            await other.welcome()
            other.sock.send(b"chatter")
            await other.is_dropped()
        await goes_on(worker, owner)


# -- hostile workers -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def false_worker(path: Path, *packets: bytes) -> AsyncIterator[list[list[int]]]:
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


def state(**more: object) -> bytes:
    fields = {"worker": NAME, "generation": 1, "instances": (), "serial": True, "credits": 1, **more}
    return wire.encode_control(wire.State(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "packets",
    [
        [b"?"],
        [wire.PING],
        [state(worker="another")],
        [state(), state(cache_rows=64)],
        [state(cache_rows=1, instances=(wire.LiveInstance(1, "m", "d", 2, 0.1),))],
    ],
    ids=["noise", "ping", "other name", "other cache", "small cache"],
)
async def test_a_worker_that_breaks_the_protocol_is_left_and_tried_again(path: Path, packets: list[bytes]) -> None:
    owner = Gateway()
    owner.link = link = link_to(path)(owner)
    try:
        async with false_worker(path, *packets) as greeted:
            link.start()
            await owner.until(lambda: bool(greeted) and link._session is None)
            assert not link.connected
            assert len(owner.lost) == len(owner.states) == len(packets) - 1
        async with running(worker_at(f"unix:{path}")):
            await owner.until(lambda: link.connected)
            await owner.run(20)
    finally:
        owner.close()


@pytest.mark.parametrize(
    "record",
    [b"??", wire.encode_result(99, 1, 1), wire.PING, None],
    ids=["noise", "unknown batch", "ping", "positions"],
)
async def test_a_ring_from_the_worker_that_is_spoilt_ends_the_link(path: Path, record: bytes | None) -> None:
    owner = Gateway()
    owner.link = link = link_to(path)(owner)
    try:
        async with false_worker(path, state()) as greeted:
            link.start()
            await owner.until(lambda: bool(owner.states))
            owner.send(3)
            size = -(-RING_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
            memory = memoryview(mmap.mmap(greeted[0][1], 2 * size + ARENA_BYTES))
            if record is None:
                memory[size : size + 8] = b"\xff" * 8
            else:
                assert Ring(memory[size : size + RING_BYTES]).push(record)
            os.eventfd_write(greeted[0][3], 1)
            await owner.until(lambda: bool(owner.lost))
            assert "broke the protocol" in owner.lost[0]
        async with running(worker_at(f"unix:{path}")):
            await owner.until(lambda: link.connected)
            await owner.run(20)
        await owner.until(lambda: owner.lost[1:] == ["it has left"])
    finally:
        owner.close()
