"""The link over ZeroMQ: gateway and worker with real TCP on 127.0.0.1, with and without CURVE."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from ensemble_contract import wire
from ensemble_contract.keys import KeyFiles
from ensemble_contract.plan import WorkerAddress
from ensemble_gateway.links import SILENCE_S
from ensemble_gateway.links.zeromq import ZeroMQLink
from tests.support.link_pairs import (
    BATCH_ROWS,
    BIG_INPUTS,
    DEADLINE_S,
    INPUTS,
    NAME,
    Gateway,
    NumpyWorker,
    free_port,
    gateway,
    open_descriptors,
    running,
    worker_at,
    worker_process,
)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.term()


@pytest.fixture
def linker(context: zmq.Context[zmq.Socket[bytes]]) -> Callable[..., Callable[[Gateway], ZeroMQLink]]:
    def link_to(address: str, keys: KeyFiles | None = None) -> Callable[[Gateway], ZeroMQLink]:
        def make(owner: Gateway) -> ZeroMQLink:
            return ZeroMQLink(WorkerAddress(NAME, address), owner.store, "gateway", owner, context, keys)

        return make

    return link_to


Linker = Callable[..., Callable[[Gateway], ZeroMQLink]]


@pytest.fixture
def address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


async def test_thousands_of_batches_of_random_ranges(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        await owner.run(2000, cancel=0.2)
        assert owner.checked_rows > 12_000
        assert owner.lost == []


async def test_gateways_share_a_worker(address: str, linker: Linker) -> None:
    async with running(worker_at(address)) as worker, contextlib.AsyncExitStack() as stack:
        owners = [await stack.enter_async_context(gateway(linker(address), seed=seed)) for seed in range(4)]
        await asyncio.gather(*(owner.run(300, cancel=0.1) for owner in owners))
        assert worker.gateways == 4
        assert [owner.lost for owner in owners] == [[]] * 4


async def test_big_rows(address: str, linker: Linker) -> None:
    """Frames of up to 10 MB, which libzmq takes without a copy: a slot that is reused changes nothing on its way."""
    worker = worker_at(address, inputs=BIG_INPUTS, cache_rows=48)
    async with running(worker), gateway(linker(address), slots=48, inputs=BIG_INPUTS) as owner:
        await owner.run(60, most_rows=16, cancel=0.1)


async def test_cache_smaller_than_the_store(address: str, linker: Linker) -> None:
    """Rows are evicted and put again; batches for which there is no room wait, and are all answered."""
    worker = worker_at(address, cache_rows=2 * BATCH_ROWS)
    async with running(worker), gateway(linker(address), slots=1024) as owner:
        await owner.run(1500, in_flight=12, cancel=0.3)
        assert owner.lost == []


async def test_a_row_that_waited_for_room_while_its_slot_was_reused(address: str, linker: Linker) -> None:
    """A waiting batch is sent with what its freed slots hold by then; that must not be taken for their next rows."""
    worker = worker_at(address, cache_rows=BATCH_ROWS)
    async with running(worker), gateway(linker(address), slots=2 * BATCH_ROWS + 8) as owner:
        for _ in range(30):
            worker.gate.clear()
            owner.send(BATCH_ROWS)
            waiting = owner.send(4, 4)
            assert waiting is not None
            owner.free(waiting.entries[0].request)
            worker.open_gate()
            await owner.until(lambda: not owner.in_flight)
            await owner.run(3, in_flight=1, most_rows=8)
        assert owner.wrong == []


async def test_worker_that_leaves_is_lost_once_and_found_again(address: str, linker: Linker) -> None:
    first = worker_at(address)
    first.start()
    async with gateway(linker(address)) as owner:
        await owner.run(20)
        first.stop()
        await owner.until(lambda: bool(owner.lost), timeout_s=2)
        await asyncio.sleep(1.5)
        assert len(owner.lost) == 1
        async with running(worker_at(address)):
            await owner.until(lambda: len(owner.states) == 2)
            await owner.run(20)
        await owner.until(lambda: len(owner.lost) == 2)


async def test_killed_worker_is_lost_at_once_with_its_batches(address: str, linker: Linker) -> None:
    with worker_process(address) as process:
        async with gateway(linker(address)) as owner:
            await owner.run(50)
            process.kill()
            owner.send(5)
            await owner.until(lambda: bool(owner.lost), timeout_s=2)
            assert owner.lost == ["its connection has ended"]
            with worker_process(address):
                await owner.until(lambda: len(owner.states) == 2)
                await owner.run(50)


async def test_gateway_that_leaves_frees_its_cache(address: str, linker: Linker) -> None:
    rows = 5000
    cache_bytes = rows * BIG_INPUTS[0].row_bytes
    worker = worker_at(address, inputs=BIG_INPUTS, cache_rows=rows)
    async with running(worker), gateway(linker(address), slots=8, inputs=BIG_INPUTS) as staying:
        await staying.run(1, most_rows=2)
        alone = mapped_bytes()
        async with gateway(linker(address), slots=8, inputs=BIG_INPUTS) as leaving:
            await leaving.run(2, most_rows=2)
            assert worker.gateways == 2
            assert mapped_bytes() > alone + cache_bytes
        await staying.until(lambda: worker.gateways == 1, timeout_s=2)
        await staying.run(5, most_rows=2)
        assert mapped_bytes() < alone + cache_bytes / 10
        assert staying.lost == []


def mapped_bytes() -> int:
    """The address space of this process: a cache takes it whole, its pages only once they are written."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


# -- silence -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def deaf_listener() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Accepts TCP connections and never answers; yields its address and what it heard."""
    heard: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                heard.append(chunk)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def test_a_peer_that_accepts_and_never_answers(linker: Linker, caplog: pytest.LogCaptureFixture) -> None:
    owner = Gateway()
    async with deaf_listener() as (address, heard):
        owner.link = link = linker(address)(owner)
        began = time.monotonic()
        try:
            link.start()
            await owner.until(lambda: "nothing was heard from it for 3 s" in caplog.text, timeout_s=2 * SILENCE_S)
            assert SILENCE_S <= time.monotonic() - began < SILENCE_S + 1.5
            connections = len(heard)
            await owner.until(lambda: len(heard) > connections, timeout_s=4)
            assert (owner.states, owner.lost) == ([], []), "a worker that never was there cannot be lost"
        finally:
            owner.close()


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


def state(**more: object) -> bytes:
    fields = {"worker": NAME, "generation": 1, "instances": (), "serial": True, "credits": 1, "cache_rows": 64, **more}
    return wire.encode_control(wire.State(**fields))  # type: ignore[arg-type]


async def test_a_worker_that_falls_silent_is_lost(address: str, linker: Linker) -> None:
    with false_worker(address) as worker:
        owner = Gateway()
        owner.link = linker(address)(owner)
        try:
            owner.link.start()
            worker.sock.send_multipart([await worker.hear(wire.Hello), state()])
            await owner.until(lambda: bool(owner.states))
            for _ in range(4):
                worker.sock.send_multipart([await worker.hear(wire.Ping), wire.PING])
            assert owner.lost == [], "signs of life keep it"
            await owner.until(lambda: bool(owner.lost), timeout_s=2 * SILENCE_S)
            assert owner.lost == ["nothing was heard from it for 3 s"]
        finally:
            owner.close()


async def test_a_row_goes_to_a_worker_once(address: str, linker: Linker) -> None:
    """Members on one worker that see the same rows cost one PUT; freed slots are put again."""
    with false_worker(address) as worker:
        owner = Gateway()
        owner.link = link = linker(address)(owner)
        try:
            link.start()
            worker.sock.send_multipart([await worker.hear(wire.Hello), state()])
            await owner.until(lambda: bool(owner.states))
            batch = owner.send(6)
            assert batch is not None
            link.send(replace(batch, id=100))
            owner.free(batch.entries[0].request)
            assert owner.send(2) is not None
            heard: list[wire.Message] = []
            async with asyncio.timeout(DEADLINE_S):
                while len(heard) < 5:
                    while worker.sock.poll(0):
                        heard.append(wire.decode(worker.sock.recv_multipart()[1]))
                    await asyncio.sleep(0.01)
            kept = [message for message in heard if isinstance(message, wire.Put | wire.Run)]
            rows = [m.rows if isinstance(m, wire.Run) else m.cache.rows for m in kept]
            assert list(zip(map(type, kept), rows, strict=True)) == [
                (wire.Put, 6), (wire.Run, 6), (wire.Run, 6), (wire.Put, 2), (wire.Run, 2)
            ]  # fmt: skip
            assert isinstance(kept[1], wire.Run)
            assert isinstance(kept[0], wire.Put)
            assert kept[1].ranges == kept[0].cache
            owner.in_flight.clear()
        finally:
            owner.close()


@pytest.mark.parametrize(
    "replies",
    [
        [[b"?"]],
        [[state(cache_rows=0)]],
        [[state(worker="another")]],
        [[state()], [state(cache_rows=65)]],
        [[state(cache_rows=1, instances=(wire.LiveInstance(1, "m", "d", 2, 0.1),))]],
        [[state()], [wire.encode_result(99, 1, 1), b"", b""]],
        [[state()], [wire.encode_run(1, 1, 1, 0, [(0, 1)])]],
        [[state()], "one output"],
        [[state()], "short outputs"],
    ],
    ids=["noise", "no cache", "other name", "other cache", "small cache", "unknown batch", "run", "output", "short"],
)
async def test_a_worker_that_breaks_the_protocol_is_left(
    address: str, linker: Linker, replies: list[list[bytes] | str], caplog: pytest.LogCaptureFixture
) -> None:
    answers = {"one output": [b"\0" * 48], "short outputs": [b"\0" * 48, b"\0" * 16]}
    owner = Gateway()
    owner.link = link = linker(address)(owner)
    try:
        with false_worker(address) as worker:
            link.start()
            identity = await worker.hear(wire.Hello)
            for reply in replies:
                if isinstance(reply, str):
                    await owner.until(lambda: bool(owner.states))
                    batch = owner.send(3)
                    assert batch is not None
                    reply = [wire.encode_result(batch.id, 1, 1), *answers[reply]]
                worker.sock.send_multipart([identity, *reply])
            await owner.until(lambda: "it broke the protocol" in caplog.text)
            assert not link.connected
            assert len(owner.lost) == len(owner.states) == len(replies) - 1
            assert await worker.hear(wire.Bye) == identity
        async with running(worker_at(address)):
            await owner.until(lambda: link.connected)
            await owner.run(20)
    finally:
        owner.close()


# -- hostile gateways ----------------------------------------------------------------------------------------------


class Stranger:
    """A DEALER in our own hands."""

    def __init__(self, address: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sock = self.context.socket(zmq.DEALER)
        self.sock.linger = 0
        self.sock.connect(address)

    async def hear(self, kind: type[wire.Message]) -> wire.Message:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if self.sock.poll(0):
                message = wire.decode(self.sock.recv_multipart()[0])
                if isinstance(message, kind):
                    return message
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} within {DEADLINE_S} s")

    async def greet(self) -> None:
        self.sock.send(wire.encode_control(wire.Hello("stranger")))
        await self.hear(wire.State)

    def close(self) -> None:
        self.sock.close(0)
        self.context.term()


@contextlib.contextmanager
def stranger(address: str) -> Iterator[Stranger]:
    made = Stranger(address)
    try:
        yield made
    finally:
        made.close()


async def goes_on(worker: NumpyWorker, owner: Gateway) -> None:
    await owner.until(lambda: worker.gateways == 1)
    await owner.run(20)
    assert owner.lost == []


X, TAG = bytes(3 * INPUTS[0].row_bytes), bytes(3 * INPUTS[1].row_bytes)
GARBAGE = {
    "nothing": [b""],
    "noise": [b"\xff" * 40],
    "a state": [state()],
    "a result": [wire.encode_result(1, 1, 1)],
    "put without tensors": [wire.encode_put([(0, 3)])],
    "put of one tensor": [wire.encode_put([(0, 3)]), X],
    "put of short tensors": [wire.encode_put([(0, 3)]), X, TAG[:-1]],
    "put of long tensors": [wire.encode_put([(0, 2)]), X, TAG],
    "put beyond the cache": [wire.encode_put([(254, 3)]), X, TAG],
    "put from the store": [wire.encode_put([(0, 3)], [(0, 3)]), X, TAG],
    "too large a frame": [wire.PING + bytes(4 << 20)],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_drops_its_gateway_only(address: str, linker: Linker, frames: list[bytes]) -> None:
    async with running(worker_at(address)) as worker, gateway(linker(address)) as owner:
        with stranger(address) as other:
            await other.greet()
            other.sock.send_multipart(frames)
            if len(frames[0]) < 1 << 20:
                await other.hear(wire.Bye)
                await goes_on(worker, owner)
        await owner.run(20)
        assert owner.lost == []


async def test_an_unknown_gateway_is_told_so(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        with stranger(address) as other:
            for message in (wire.PING, wire.encode_run(1, 1, 1, 0, [(0, 1)])):
                other.sock.send(message)
                await other.hear(wire.Bye)
            other.sock.send(wire.BYE)
            await other.greet()
        await owner.run(20)
        assert owner.lost == []


async def test_a_worker_that_has_forgotten_its_gateway_is_greeted_again(address: str, linker: Linker) -> None:
    with false_worker(address) as worker:
        owner = Gateway()
        owner.link = linker(address)(owner)
        try:
            owner.link.start()
            first = await worker.hear(wire.Hello)
            worker.sock.send_multipart([first, state()])
            await owner.until(lambda: bool(owner.states))
            worker.sock.send_multipart([await worker.hear(wire.Ping), wire.BYE])
            second = await worker.hear(wire.Hello)
            assert first != second
            worker.sock.send_multipart([second, state()])
            await owner.until(lambda: len(owner.states) == 2)
            assert len(owner.lost) == 1
        finally:
            owner.close()


async def test_strangers_at_the_port_are_closed(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        port = int(address.rpartition(":")[2])
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b""):
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as sock:
                sock.sendall(noise)
        await owner.run(20)
        assert owner.lost == []


async def test_a_gateway_that_never_stops_talking_does_not_silence_the_others(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        with stranger(address) as other:
            await other.greet()
            done = asyncio.create_task(owner.run(100))
            async with asyncio.timeout(DEADLINE_S):
                while not done.done():
                    for _ in range(100):
                        other.sock.send(wire.PING)
                    await asyncio.sleep(0)
            await done


# -- CURVE ---------------------------------------------------------------------------------------------------------


def key_pairs() -> tuple[KeyFiles, KeyFiles]:
    """The worker's and the gateway's."""
    (worker_public, worker_secret), (gateway_public, gateway_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    return KeyFiles(worker_public, worker_secret, gateway_public), KeyFiles(
        gateway_public, gateway_secret, worker_public
    )


async def test_the_listed_key_is_admitted(address: str, linker: Linker) -> None:
    worker_keys, gateway_keys = key_pairs()
    worker = worker_at(address, keys=worker_keys)
    async with running(worker), gateway(linker(address, gateway_keys)) as owner:
        await owner.run(200, cancel=0.1)
        assert owner.lost == []


def wrong_keys(gateway_keys: KeyFiles) -> dict[str, KeyFiles | None]:
    public, secret = zmq.curve_keypair()
    return {
        "unlisted": replace(gateway_keys, own_public=public, own_secret=secret),
        "wrong server": replace(gateway_keys, peer_public=public),
        "none": None,
    }


@pytest.mark.parametrize("which", ["unlisted", "wrong server", "none"])
async def test_other_keys_are_refused(
    address: str, linker: Linker, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An unlisted key knows the server's public key, which CURVE alone would admit."""
    worker_keys, gateway_keys = key_pairs()
    worker = worker_at(address, keys=worker_keys)
    async with running(worker), gateway(linker(address, gateway_keys)) as owner:
        refused = Gateway()
        refused.link = linker(address, wrong_keys(gateway_keys)[which])(refused)
        try:
            refused.link.start()
            await refused.until(lambda: "worker-0 cannot be used" in caplog.text, timeout_s=SILENCE_S + 2)
            assert worker.gateways == 1
            assert (refused.states, refused.link.connected) == ([], False)
            if which == "unlisted":
                assert "the handshake failed" in caplog.text
        finally:
            refused.close()
        await owner.run(20)
        assert owner.lost == []


async def test_a_worker_without_keys_refuses_a_gateway_with_keys(
    address: str, linker: Linker, caplog: pytest.LogCaptureFixture
) -> None:
    _, gateway_keys = key_pairs()
    async with running(worker_at(address)) as worker:
        refused = Gateway()
        refused.link = linker(address, gateway_keys)(refused)
        try:
            refused.link.start()
            await refused.until(lambda: "worker-0 cannot be used" in caplog.text, timeout_s=SILENCE_S + 2)
            assert worker.gateways == 0
        finally:
            refused.close()


# -- addresses -----------------------------------------------------------------------------------------------------


async def test_a_name_is_resolved_and_an_unknown_one_tried_again(
    linker: Linker, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    async with running(worker_at(f"tcp://127.0.0.1:{port}")), gateway(linker(f"tcp://localhost:{port}")) as owner:
        await owner.run(5)
    lonely = Gateway()
    lonely.link = linker(f"tcp://no-such-host.invalid:{port}")(lonely)
    try:
        lonely.link.start()
        await lonely.until(lambda: caplog.text.count("cannot be resolved") == 2)
    finally:
        lonely.close()


async def test_an_address_in_use_is_an_error_that_names_it(address: str) -> None:
    async with running(worker_at(address)):
        gc.collect()
        before = open_descriptors()
        with pytest.raises(OSError, match=address):
            worker_at(address).server.start()
        gc.collect()
        assert open_descriptors() <= before
