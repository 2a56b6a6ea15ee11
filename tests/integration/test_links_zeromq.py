"""The link over ZeroMQ: gateway and worker with real TCP on 127.0.0.1, with and without CURVE."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from ensemble_contract import wire
from ensemble_gateway.links import HEARTBEAT_S, SILENCE_S
from tests.support.descriptors import open_descriptors
from tests.support.link_members import BIG_INPUTS, INPUTS, INSTANCES, stacked
from tests.support.link_pairs import (
    BATCH_ROWS,
    DEADLINE_S,
    Gateway,
    gateway,
    running,
    worker_at,
    worker_process,
)
from tests.support.link_strangers import (
    Linker,
    false_worker,
    state,
    zeromq_links,
    zeromq_stranger,
)


async def test_thousands_of_batches_of_random_ranges(address: str, linker: Linker) -> None:
    async with running(worker_at(address)), gateway(linker(address)) as owner:
        await owner.run(2000, cancel=0.2)
        assert owner.checked_rows > 12_000
        assert owner.lost == []


async def test_several_instances_in_one_run(address: str, linker: Linker) -> None:
    """Members that see the same rows: one RUN, one RESULT, every output of each of them in its place."""
    async with running(worker_at(address)) as worker, gateway(linker(address)) as owner:
        await owner.run(400, most_members=6, cancel=0.1)
        for instances in (INSTANCES, reversed(INSTANCES), [64, 1, 33]):
            owner.send(5, 1, BATCH_ROWS - 6, instances=list(instances))
        await owner.until(lambda: not owner.in_flight)
        assert (owner.wrong, owner.lost) == ([], [])
        assert worker.batches == owner.answered == 403


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


async def test_a_worker_that_falls_silent_was_well_until_then(address: str, linker: Linker) -> None:
    """It is lost 3 s after it was heard, and what it was given in the last 2 of them is not why."""
    loop = asyncio.get_running_loop()
    with worker_process(address) as process:
        async with gateway(linker(address)) as owner:
            await owner.run(50)
            running_at = loop.time()
            process.send_signal(signal.SIGSTOP)
            await owner.until(lambda: bool(owner.lost))
            assert owner.lost == [f"nothing was heard from it for {SILENCE_S:.0f} s"]
            assert running_at <= owner.well_until <= loop.time() - (SILENCE_S - HEARTBEAT_S)


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


@pytest.mark.parametrize("put_with_run", [False, True])
async def test_a_row_goes_to_a_worker_once(address: str, linker: Linker, put_with_run: bool) -> None:
    """Members on one worker that see the same rows cost one PUT; freed slots are put again.

    A PUT has a message of its own only for a worker that wants it so.
    """
    with false_worker(address) as worker:
        owner = Gateway()
        owner.link = link = linker(address)(owner)
        try:
            link.start()
            worker.sock.send_multipart([await worker.hear(wire.Hello), state(64, put_with_run=put_with_run)])
            await owner.until(lambda: bool(owner.states))
            batch = owner.send(6)
            assert batch is not None
            link.send(replace(batch, id=100))
            owner.free(batch.entries[0].request)
            assert owner.send(2) is not None
            kept: list[wire.Put | wire.Run] = []
            lengths = []
            async with asyncio.timeout(DEADLINE_S):
                while len(kept) < 5:
                    while worker.sock.poll(0):
                        frames = worker.sock.recv_multipart()[1:]
                        first = wire.decode(frames[0])
                        messages = [first, *map(wire.decode, frames[1 + len(INPUTS) :])]
                        wanted = [message for message in messages if isinstance(message, wire.Put | wire.Run)]
                        lengths += [len(wanted)] if wanted else []
                        kept += wanted
                    await asyncio.sleep(0.01)
            rows = [m.rows if isinstance(m, wire.Run) else m.cache.rows for m in kept]
            assert list(zip(map(type, kept), rows, strict=True)) == [
                (wire.Put, 6), (wire.Run, 6), (wire.Run, 6), (wire.Put, 2), (wire.Run, 2)
            ]  # fmt: skip
            assert lengths == ([2, 1, 2] if put_with_run else [1, 1, 1, 1, 1])
            assert isinstance(kept[1], wire.Run)
            assert isinstance(kept[0], wire.Put)
            assert kept[1].ranges == kept[0].cache
            owner.in_flight.clear()
        finally:
            owner.close()


async def test_an_address_in_use_is_an_error_that_names_it(address: str) -> None:
    async with running(worker_at(address)):
        gc.collect()
        before = open_descriptors()
        with pytest.raises(OSError, match=address):
            worker_at(address).server.start()
        gc.collect()
        assert open_descriptors() <= before


@pytest.mark.parametrize("sockets", [3, 4])
async def test_a_gateway_without_room_for_a_socket_tries_again(
    address: str, sockets: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There is room for the three of one link: none for another link's first, then none for its monitor's."""
    with zeromq_links(sockets) as linker:
        async with running(worker_at(address)):
            async with gateway(linker(address)):
                waiting = Gateway()
                waiting.link = linker(address)(waiting)
                waiting.link.start()
                await waiting.until(lambda: "no connection can be opened: Too many open files" in caplog.text)
            try:
                await waiting.until(lambda: bool(waiting.states))
                await waiting.run(20)
            finally:
                waiting.close()


@pytest.mark.parametrize("together", [False, True])
async def test_rows_are_there_when_a_batch_runs(address: str, together: bool) -> None:
    """Whether the RUN comes in the PUT's message or after it; a later RUN finds them too."""
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    tag = np.array([[3], [1], [2]])
    put = [wire.encode_put([(5, 3)]), x.tobytes(), tag.tobytes()]
    first, again = run_of_rows(1, [(5, 3)]), run_of_rows(2, [(7, 1), (5, 1)])
    async with running(worker_at(address)):
        with zeromq_stranger(address) as other:
            await other.greet()
            for frames in [[*put, first], [again]] if together else [put, [first], [again]]:
                other.sock.send_multipart(frames)
            for batch, chosen in ((1, [0, 1, 2]), (2, [2, 0])):
                frames = await other.hear(wire.Result)
                assert wire.decode(frames[0]) == wire.Result(batch, ANY, (ANY,))
                wanted = stacked([x[chosen], tag[chosen]], [1])
                assert frames[1:] == [output.tobytes() for output in wanted]


def run_of_rows(batch: int, ranges: list[tuple[int, int]]) -> bytes:
    """A RUN of these rows of the cache through instance 1."""
    return wire.encode_run(batch, [1], sum(count for _, count in ranges), 0, ranges)
