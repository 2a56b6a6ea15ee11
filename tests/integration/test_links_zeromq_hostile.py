"""The link over ZeroMQ with a peer that is silent or hostile: it is left or dropped, and the others go on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from ensemble_contract import wire
from ensemble_gateway.links import SILENCE_S
from tests.support.link_members import INPUTS, OUTPUTS
from tests.support.link_pairs import DEADLINE_S, Gateway, gateway, running, worker_at
from tests.support.link_strangers import (
    HOSTILE_RUNS,
    Linker,
    false_worker,
    goes_on,
    result_of,
    state,
    zeromq_stranger,
)


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


async def test_a_worker_that_falls_silent_is_lost(address: str, linker: Linker) -> None:
    with false_worker(address) as worker:
        owner = Gateway()
        owner.link = linker(address)(owner)
        try:
            owner.link.start()
            worker.sock.send_multipart([await worker.hear(wire.Hello), state(64)])
            await owner.until(lambda: bool(owner.states))
            for _ in range(4):
                worker.sock.send_multipart([await worker.hear(wire.Ping), wire.PING])
            assert owner.lost == [], "signs of life keep it"
            await owner.until(lambda: bool(owner.lost), timeout_s=2 * SILENCE_S)
            assert owner.lost == ["nothing was heard from it for 3 s"]
        finally:
            owner.close()


# To a RUN of three rows of these instances.
Y, MARK, ANSWERED = (bytes(3 * spec.row_bytes) for spec in OUTPUTS)
BAD_ANSWERS: dict[str, tuple[Sequence[int], list[bytes]]] = {
    "one output": ((1,), [Y]),
    "short outputs": ((1,), [Y, MARK, ANSWERED[:-8]]),
    "three instances, times of two": ((1, 2, 3), [3 * Y, 3 * MARK, 3 * ANSWERED]),
    "two instances, rows of one": ((1, 2), [Y, MARK, ANSWERED]),
    "two instances, one of them without an output": ((1, 2), [2 * Y, 2 * MARK, ANSWERED]),
    "one instance, rows of two": ((1,), [2 * Y, 2 * MARK, 2 * ANSWERED]),
    "an output of an instance in a frame of its own": ((1, 2), [Y, Y, MARK, MARK, ANSWERED, ANSWERED]),
}


@pytest.mark.parametrize(
    "replies",
    [
        [[b"?"]],
        [[state(0)]],
        [[state(64, worker="another")]],
        [[state(64)], [state(65)]],
        [[state(1, instances=(wire.LiveInstance(1, "m", "d", 2, 0.1),))]],
        [[state(64)], [wire.encode_result(99, 1, [1]), b"", b"", b""]],
        [[state(64)], [wire.encode_run(1, [1], 1, 0, [(0, 1)])]],
        [[state(64)], [result_of(1, 0, claimed=0)]],
        [[state(64)], [result_of(1, 65, claimed=65)]],
        [[state(64)], [result_of(1, 1, claimed=2)]],
        *([[state(64)], answer] for answer in BAD_ANSWERS),
    ],
    ids=[
        "noise",
        "no cache",
        "other name",
        "other cache",
        "small cache",
        "unknown batch",
        "run",
        "no instance",
        "65 instances",
        "fewer instances than said",
        *BAD_ANSWERS,
    ],
)
async def test_a_worker_that_breaks_the_protocol_is_left(
    address: str, linker: Linker, replies: list[list[bytes] | str], caplog: pytest.LogCaptureFixture
) -> None:
    owner = Gateway()
    owner.link = link = linker(address)(owner)
    try:
        with false_worker(address) as worker:
            link.start()
            identity = await worker.hear(wire.Hello)
            for reply in replies:
                if isinstance(reply, str):
                    await owner.until(lambda: bool(owner.states))
                    instances, outputs = BAD_ANSWERS[reply]
                    batch = owner.send(3, instances=instances)
                    assert batch is not None
                    reply = [wire.encode_result(batch.id, 1, [1] * min(2, len(instances))), *outputs]
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


X, TAG = bytes(3 * INPUTS[0].row_bytes), bytes(3 * INPUTS[1].row_bytes)
GARBAGE = {
    "nothing": [b""],
    "noise": [b"\xff" * 40],
    "a state": [state(64)],
    "a result": [wire.encode_result(1, 1, [1])],
    "put without tensors": [wire.encode_put([(0, 3)])],
    "put of one tensor": [wire.encode_put([(0, 3)]), X],
    "put of short tensors": [wire.encode_put([(0, 3)]), X, TAG[:-1]],
    "put of long tensors": [wire.encode_put([(0, 2)]), X, TAG],
    "put beyond the cache": [wire.encode_put([(254, 3)]), X, TAG],
    "put from the store": [wire.encode_put([(0, 3)], [(0, 3)]), X, TAG],
    "put that ends with noise": [wire.encode_put([(0, 3)]), X, TAG, b"\xff" * 40],
    "put that ends with a put": [wire.encode_put([(0, 3)]), X, TAG, wire.encode_put([(3, 3)])],
    "put that ends with two runs": [wire.encode_put([(0, 3)]), X, TAG, *2 * [wire.encode_run(1, [1], 3, 0, [(0, 3)])]],
    "put of one tensor that ends with a run": [wire.encode_put([(0, 3)]), X, wire.encode_run(1, [1], 3, 0, [(0, 3)])],
    **{name: [record] for name, record in HOSTILE_RUNS.items()},
    **{f"put that ends with {name}": [wire.encode_put([(0, 3)]), X, TAG, run] for name, run in HOSTILE_RUNS.items()},
    "too large a frame": [wire.PING + bytes(4 << 20)],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_drops_its_gateway_only(address: str, linker: Linker, frames: list[bytes]) -> None:
    async with running(worker_at(address)) as worker, gateway(linker(address)) as owner:
        with zeromq_stranger(address) as other:
            await other.greet()
            other.sock.send_multipart(frames)
            if len(frames[0]) < 1 << 20:
                await other.hear(wire.Bye)
                await goes_on(worker, owner)
        await owner.run(20)
        assert owner.lost == []


async def test_an_unknown_gateway_is_told_so(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        with zeromq_stranger(address) as other:
            for message in (wire.PING, wire.encode_run(1, [1], 1, 0, [(0, 1)])):
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
            worker.sock.send_multipart([first, state(64)])
            await owner.until(lambda: bool(owner.states))
            worker.sock.send_multipart([await worker.hear(wire.Ping), wire.BYE])
            second = await worker.hear(wire.Hello)
            assert first != second
            worker.sock.send_multipart([second, state(64)])
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
        with zeromq_stranger(address) as other:
            await other.greet()
            done = asyncio.create_task(owner.run(100))
            async with asyncio.timeout(DEADLINE_S):
                while not done.done():
                    for _ in range(100):
                        other.sock.send(wire.PING)
                    await asyncio.sleep(0)
            await done
