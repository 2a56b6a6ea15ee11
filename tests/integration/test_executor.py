"""The executor behind real links, with real models: what it answers and what it refuses."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from ensemble_contract import wire
from ensemble_contract.layout import StoreLayout, result_offsets
from ensemble_contract.wire import Failed, FailureCode, Result
from ensemble_worker.gather import HostRows
from ensemble_worker.links import LinkServer, StateMaker
from ensemble_worker.links.zeromq import ZeroMQServer
from ensemble_worker.predictor import Predictor
from tests.support.link_members import INPUTS, OUTPUTS, Array, stacked
from tests.support.link_pairs import DEADLINE_S, free_port
from tests.support.link_strangers import SharedStranger, shared_stranger, zeromq_stranger
from tests.support.torch_worker import TOUCHY, Worker, greeted, load_members, rows_to_see, run, shared, until, working


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Predictor]:
    return load_members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, for a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        yield Path(folder) / "data.sock"


def results_of(other: SharedStranger, at: int, instances: int, rows: int) -> list[Array]:
    """The outputs in the arena."""
    arena = other.memory.memory[2 * 8192 :]
    return [
        np.frombuffer(arena, spec.dtype, instances * rows * spec.row_elements, at + start).reshape(
            instances, rows, *spec.shape
        )
        for start, spec in zip(result_offsets(OUTPUTS, instances * rows)[0], OUTPUTS, strict=True)
    ]


def assert_same(got: Sequence[Array], wanted: Sequence[Array]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)


async def test_several_instances_of_one_run(path: Path, members: dict[int, Predictor]) -> None:
    """Every output of every instance in the RUN's order, for the rows in the RUN's order, and the time of each."""
    async with working(Worker(shared(path), members)) as worker:
        with shared_stranger(path) as other:
            rows = await greeted(other)
            for instances in ([3, 1, 2], [2], [4, 3, 2, 1]):
                other.write(run(instances, (40, 3), (2, 1), (10, 4), at=640))
                answer = await other.answer()
                assert isinstance(answer, Result)
                assert len(answer.compute_ns) == len(instances)
                assert min(answer.compute_ns) > 0
                slots = [40, 41, 42, 2, 10, 11, 12, 13]
                wanted = stacked([array[slots] for array in rows], instances)
                assert_same(results_of(other, 640, len(instances), 8), wanted)
        assert [worker.running[one].batches for one in (1, 2, 3, 4)] == [2, 3, 2, 1]
        assert [worker.running[one].rows for one in (1, 2, 3, 4)] == [16, 24, 16, 8]
        assert all(running.compute_ns > 0 for running in worker.running.values())


async def test_several_instances_of_one_run_over_zeromq(members: dict[int, Predictor]) -> None:
    """One frame an output, with all instances' rows one after the other."""
    address = f"tcp://127.0.0.1:{free_port()}"

    def make_server(state_for: StateMaker) -> LinkServer:
        return ZeroMQServer(address, INPUTS, state_for, lambda slots: HostRows.cache(INPUTS, slots), 64)

    async with working(Worker(make_server, members)):
        with zeromq_stranger(address) as other:
            await other.greet()
            rows = rows_to_see(6)
            other.sock.send_multipart([wire.encode_put([(9, 6)]), *(array.tobytes() for array in rows)])
            other.sock.send(run([3, 1, 2], (12, 3), (9, 1)))
            async with asyncio.timeout(DEADLINE_S):
                frames: list[bytes] = []
                while not frames or not isinstance(wire.decode(frames[0]), Result):
                    await until(lambda: other.sock.poll(0))
                    frames = other.sock.recv_multipart()
            wanted = stacked([array[[3, 4, 5, 0]] for array in rows], [3, 1, 2])
            got = [np.frombuffer(f, s.dtype).reshape(3, 4, *s.shape) for f, s in zip(frames[1:], OUTPUTS, strict=True)]
            assert_same(got, wanted)


@pytest.mark.parametrize(
    ("record", "code", "text"),
    [
        (run([1, 2, 77], (0, 4)), FailureCode.UNKNOWN_INSTANCE, "instance 77 is not here"),
        (run(range(100, 164), (0, 4)), FailureCode.UNKNOWN_INSTANCE, "instance 100 is not here"),
        (run([1, 2, 1], (0, 4)), FailureCode.BAD_REQUEST, "it names an instance twice"),
        (run([1, 2, 3], (0, 9)), FailureCode.BAD_REQUEST, "9 rows are over an instance's batch size"),
        (run([1, 2], (0, 4), (63, 2)), FailureCode.BAD_REQUEST, "a range ends beyond slot 64"),
        (run([1, 2], (0, 4), at=1 << 40), FailureCode.BAD_REQUEST, "beyond the arena"),
    ],
    ids=["unknown", "64 unknown", "twice", "over the smallest batch size", "beyond the store", "beyond the arena"],
)
async def test_an_impossible_run_is_failed(
    path: Path, members: dict[int, Predictor], record: bytes, code: FailureCode, text: str
) -> None:
    async with working(Worker(shared(path), members)) as worker:
        with shared_stranger(path) as other:
            await greeted(other)
            other.write(record)
            answer = await other.answer()
            assert isinstance(answer, Failed)
            assert (answer.batch, answer.code) == (5, code)
            assert text in answer.text
            other.write(run([1, 3], (0, 8)))
            assert isinstance(await other.answer(), Result)
        assert worker.lost == []


async def test_instances_of_a_parallel_device_run_one_by_one(path: Path, members: dict[int, Predictor]) -> None:
    async with working(Worker(shared(path), members, serial=False)):
        with shared_stranger(path) as other:
            rows = await greeted(other)
            other.write(run([1, 2], (0, 4)))
            answer = await other.answer()
            assert isinstance(answer, Failed)
            assert (answer.code, answer.text) == (
                FailureCode.BAD_REQUEST, "instances of a parallel device run one by one"
            )  # fmt: skip
            other.write(run([2], (8, 4)))
            assert isinstance(await other.answer(), Result)
            assert_same(results_of(other, 0, 1, 4), stacked([array[8:12] for array in rows], [2]))


async def test_one_instance_that_fails_fails_the_run(path: Path, members: dict[int, Predictor]) -> None:
    """The failure is its own; the others have not run a batch, for nobody gets their outputs."""
    async with working(Worker(shared(path), members)) as worker:
        with shared_stranger(path) as other:
            rows = await greeted(other)
            StoreLayout(INPUTS, 64).arrays(other.store.memory)[1][5] = -1
            other.write(run([1, TOUCHY, 2], (4, 3)))
            answer = await other.answer()
            assert isinstance(answer, Failed)
            assert answer.code is FailureCode.MODEL_ERROR
            assert {one: running.failures for one, running in worker.running.items()} == {1: 0, 2: 0, 3: 0, TOUCHY: 1}
            assert all(running.batches == 0 for running in worker.running.values())
            other.write(run([1, TOUCHY, 2], (6, 3)))
            assert isinstance(await other.answer(), Result)
            assert_same(results_of(other, 0, 3, 3), stacked([array[6:9] for array in rows], [1, TOUCHY, 2]))
        assert worker.lost == []
