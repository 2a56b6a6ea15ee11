"""The link in shared memory with a hostile peer: it is dropped, nothing of it is kept, and the others go on."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout, result_offsets
from ensemble_contract.ring import HEADER_BYTES, Ring
from ensemble_gateway.links.shared import ARENA_BYTES, RING_BYTES
from tests.support.descriptors import open_descriptors
from tests.support.link_members import INPUTS, INSTANCES, OUTPUTS
from tests.support.link_pairs import DEADLINE_S, Gateway, gateway, running, worker_at
from tests.support.link_strangers import (
    ARENA,
    HOSTILE_RUNS,
    RING,
    false_shared_worker,
    goes_on,
    result_of,
    shared_link,
    shared_stranger,
    state,
)


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, for a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        yield Path(folder) / "data.sock"


def run(rows: int, ranges: list[tuple[int, int]], at: int = 0, instances: Sequence[int] = (1,)) -> bytes:
    return wire.encode_run(7, instances, rows, at, ranges)


RING_GARBAGE = {
    "noise": [b"\xff" * 40],
    "no head": [b"EO"],
    "other version": [run(1, [(0, 1)]).replace(b"EO\x01", b"EO\x02")],
    "a state": [wire.encode_control(wire.State("x", 1, (), True, 1))],
    "a put where rows are read in place": [wire.encode_put([(0, 1)], [(0, 1)])],
    "good, then bad": [run(1, [(0, 1)]), b"????????"],
    **{name: [record] for name, record in HOSTILE_RUNS.items()},
}


@pytest.mark.parametrize("records", RING_GARBAGE.values(), ids=RING_GARBAGE)
async def test_garbage_in_the_ring_drops_its_gateway_only(path: Path, records: list[bytes]) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet()
            assert isinstance(await other.welcome(), wire.State)
            other.write(*records)
            await other.is_dropped()
            await goes_on(worker, owner)
        async with gateway(shared_link(path), seed=1) as later:
            await later.run(5)


@pytest.mark.parametrize(("position", "value"), [(0, 5), (0, 1 << 20), (0, (1 << 64) - 1), (8, 1 << 20), (8, 1 << 63)])
async def test_spoilt_positions_drop_their_gateway_only(path: Path, position: int, value: int) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
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
    async with running(worker), gateway(shared_link(path)) as owner:
        for put in (
            wire.encode_put([(60, 5)], [(0, 5)]),
            wire.encode_put([(0, 5)], [(60, 5)]),
            wire.encode_put([(0, 65)], [(0, 1)] * 65),
            wire.encode_put([(0, 50)] * 2, [(0, 50)] * 2),
            wire.encode_put([(0, 5)]),
        ):
            with shared_stranger(path) as other:
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
    async with running(worker_at(f"unix:{path}")), gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet()
            await other.welcome()
            other.write(record)
            answer = await other.answer()
            assert isinstance(answer, wire.Failed)
            assert (answer.batch, answer.code) == (7, wire.FailureCode.BAD_REQUEST)
            assert text in answer.text
            await owner.run(20)


async def test_who_rings_before_it_has_greeted_is_answered(path: Path) -> None:
    """Its doorbell is not rung again for what it had written."""
    async with running(worker_at(f"unix:{path}")):
        with shared_stranger(path) as other:
            other.write(run(32, [(0, 32)]))
            other.greet()
            await other.welcome()
            assert isinstance(await other.answer(), wire.Result)


async def test_results_of_many_instances_need_so_much_more_room(path: Path) -> None:
    """At the last place where one instance's 32 rows fit, those of several do not, and nothing is written there."""
    at = ARENA - result_offsets(OUTPUTS, 32)[1]
    async with running(worker_at(f"unix:{path}")), gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet()
            await other.welcome()
            arena = other.memory.memory[2 * 8192 :]
            for instances in ((1, 2), INSTANCES):
                other.write(run(32, [(0, 32)], at, instances))
                answer = await other.answer()
                assert isinstance(answer, wire.Failed)
                assert "beyond the arena" in answer.text
                assert not any(arena)
            other.write(run(32, [(0, 32)], at))
            assert isinstance(await other.answer(), wire.Result)
            assert any(arena[at:])
            assert not any(arena[:at])
            await owner.run(20)


async def test_a_gateway_that_does_not_read_its_ring_is_dropped(path: Path) -> None:
    """It cannot make the others wait."""
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet()
            await other.welcome()
            dropped = asyncio.create_task(other.is_dropped())
            async with asyncio.timeout(DEADLINE_S):
                while not dropped.done():
                    other.to_worker.push(run(1, [(99, 1)]))
                    os.eventfd_write(other.bells[0], 1)
                    await asyncio.sleep(0)
            await goes_on(worker, owner)


async def test_a_ring_too_small_for_an_answer_drops_its_gateway(path: Path) -> None:
    """The times of 64 instances are over half of the smallest ring that a gateway may ask for."""
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet(shared=msgspec.structs.replace(other.shared, ring_bytes=wire.MIN_RING_BYTES))
            await other.welcome()
            other.write(run(1, [(0, 1)], instances=INSTANCES))
            await other.is_dropped()
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
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        gc.collect()
        before = open_descriptors()
        with shared_stranger(path) as other, tempfile.TemporaryFile() as file:
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
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.sock.send(noise)
            await other.is_dropped()
            await goes_on(worker, owner)


async def test_a_gateway_that_chatters_is_dropped(path: Path) -> None:
    async with running(worker_at(f"unix:{path}")) as worker, gateway(shared_link(path)) as owner:
        with shared_stranger(path) as other:
            other.greet()
            await other.welcome()
            other.sock.send(b"chatter")
            await other.is_dropped()
        await goes_on(worker, owner)


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
    owner.link = link = shared_link(path)(owner)
    try:
        async with false_shared_worker(path, *packets) as greeted:
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
    [
        b"??",
        wire.encode_result(99, 1, [1]),
        result_of(1, 0, claimed=0),
        result_of(1, 65, claimed=65),
        result_of(1, 1, claimed=2),
        wire.encode_result(1, 1, [1, 1]),
        wire.PING,
        None,
    ],
    ids=[
        "noise",
        "unknown batch",
        "no instance",
        "65 instances",
        "fewer instances than said",
        "more instances than asked",
        "ping",
        "positions",
    ],
)
async def test_a_ring_from_the_worker_that_is_spoilt_ends_the_link(path: Path, record: bytes | None) -> None:
    owner = Gateway()
    owner.link = link = shared_link(path)(owner)
    try:
        async with false_shared_worker(path, state()) as greeted:
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
