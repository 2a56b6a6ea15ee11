"""How the executor ends its worker, and what it does not do for a gateway that has gone."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble_contract import wire
from ensemble_contract.wire import Result
from ensemble_worker.errors import DeviceLost
from ensemble_worker.links import LinkServer, Rows, StateMaker
from ensemble_worker.links.zeromq import ZeroMQServer
from ensemble_worker.predictor import Predictor
from tests.support.link_members import INPUTS, Array
from tests.support.link_pairs import DEADLINE_S, free_port
from tests.support.link_strangers import SharedStranger, shared_stranger, zeromq_stranger
from tests.support.torch_worker import Worker, greeted, load_members, rows_to_see, run, shared, until, working


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Predictor]:
    return load_members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def path() -> Iterator[Path]:
    """Short, for a Unix socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="links-") as folder:
        yield Path(folder) / "data.sock"


class FullDevice:
    """Rows on a device without memory for one more upload, as torch says it; or on one that is lost."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def gather(self, ranges: wire.RowRanges) -> list[Array]:
        raise AssertionError("nothing was put")

    def put(self, ranges: wire.RowRanges, arrays: Sequence[Array]) -> None:
        raise self.error


class LostDevice(FullDevice):
    error = DeviceLost("cuda:0 cannot be used again by this process: an illegal memory access was encountered")


@pytest.mark.parametrize("over", ["shared memory", "zeromq"])
@pytest.mark.parametrize(
    ("rows", "text"),
    [(FullDevice, "OutOfMemoryError: CUDA out of memory"), (LostDevice, "cuda:0 cannot be used again")],
    ids=["no memory", "lost"],
)
async def test_a_device_that_fails_on_a_put_ends_the_worker(
    path: Path,
    members: dict[int, Predictor],
    rows: type[FullDevice],
    text: str,
    over: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its heartbeats would go on, and the gateway would wait for batches that nobody runs."""
    address = f"tcp://127.0.0.1:{free_port()}"

    def make_rows(slots: int) -> Rows:
        return rows(slots)

    def make_server(state_for: StateMaker) -> LinkServer:
        if over == "zeromq":
            return ZeroMQServer(address, INPUTS, state_for, make_rows, 64)
        return shared(path, make_rows)(state_for)

    async with working(Worker(make_server, members)) as worker:
        with zeromq_stranger(address) if over == "zeromq" else shared_stranger(path) as other:
            if isinstance(other, SharedStranger):
                await greeted(other)
                other.write(wire.encode_put([(0, 3)], [(0, 3)]))
            else:
                await other.greet()
                other.sock.send_multipart([wire.encode_put([(0, 3)]), *(array.tobytes() for array in rows_to_see(3))])
            await until(lambda: worker.lost)
            assert len(worker.lost) == 1
            assert worker.lost[0].startswith(text)
            assert "executor cannot go on" in caplog.text
            assert text in caplog.text


class Held:
    """A member that waits for the test before it answers; `outputs`, if given, are its answer."""

    fixed_batch: int | None = None
    form = "held"
    batch_size = 32

    def __init__(self, inner: Predictor, outputs: list[Array] | None = None) -> None:
        self.calls = 0
        self.gate = threading.Event()
        self._inner = inner
        self._outputs = outputs

    def run(self, inputs: Sequence[Any]) -> list[Array]:
        self.calls += 1
        assert self.gate.wait(DEADLINE_S)
        return self._inner.run(inputs) if self._outputs is None else self._outputs


@pytest.mark.parametrize("serial", [True, False])
async def test_an_answer_that_cannot_be_given_ends_the_worker(
    path: Path, members: dict[int, Predictor], serial: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the executor's thread and in an instance's."""
    silent = Held(members[1], outputs=[])
    silent.gate.set()
    async with working(Worker(shared(path), {1: silent}, serial=serial)) as worker:
        with shared_stranger(path) as other:
            await greeted(other)
            other.write(run([1], (0, 4)))
            await until(lambda: worker.lost)
            assert worker.lost == ["IndexError: list index out of range"]
            assert ("executor" if serial else "m1") + " cannot go on" in caplog.text


@pytest.mark.parametrize("serial", [True, False])
async def test_batches_of_a_gateway_that_has_gone_are_not_run(
    path: Path, members: dict[int, Predictor], serial: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither run nor counted as a failure; the next gateway's are."""
    held = Held(members[1])
    with caplog.at_level(logging.WARNING):
        async with working(Worker(shared(path), {1: held, 2: members[2]}, serial=serial)) as worker:
            with shared_stranger(path) as leaving:
                await greeted(leaving)
                leaving.write(*[run([1], (0, 4))] * 5)
                await until(lambda: held.calls == 1)
                leaving.sock.close()
                if not serial:
                    await until(lambda: worker.gateways == 0)
                else:
                    # The executor's thread buries it when the batch that runs has ended.
                    await until(lambda: all(peer.gone for peer in worker.server._peers.values()))  # type: ignore[attr-defined]
                held.gate.set()
                await until(lambda: worker.gateways == 0)
            with shared_stranger(path) as next_one:
                await greeted(next_one)
                next_one.write(run([1], (0, 4)))
                assert isinstance(await next_one.answer(), Result)
            assert held.calls == 2
            assert worker.running[1].failures == 0
            assert worker.lost == []
    assert caplog.text == ""


@pytest.mark.parametrize("serial", [True, False])
async def test_an_instance_that_leaves_answers_what_it_was_given(
    path: Path, members: dict[int, Predictor], serial: bool
) -> None:
    """Batches that were received run; those that come later are unknown. The others run on."""
    held = Held(members[1])
    async with working(Worker(shared(path), {1: held, 2: members[2]}, serial=serial)) as worker:
        with shared_stranger(path) as other:
            await greeted(other)
            other.write(run([1], (0, 4)), run([1], (4, 4)), run([1], (8, 4)))
            await until(lambda: held.calls == 1)
            gone = threading.Event()
            worker.running[1].withdrawn = True
            assert [one.id for one in worker.executor.instances()] == [2]
            if not serial:
                await until(lambda: worker.running[1].queue.qsize() == 2)
            worker.executor.remove(1, gone.set)
            assert not gone.wait(0.05)
            assert worker.executor.busy_s() > 0.04
            held.gate.set()
            answers: list[wire.Message] = []

            def all_answered() -> bool:
                answers.extend(map(wire.decode, other.from_worker.pop_all()))
                return len(answers) >= 3

            await until(all_answered)
            assert [type(answer) for answer in answers] == [Result] * 3
            await until(gone.is_set)
            assert held.calls == 3
            assert worker.executor.busy_s() == 0.0
            other.write(run([1], (0, 4)))
            answer = await other.answer()
            assert isinstance(answer, wire.Failed)
            assert answer.code is wire.FailureCode.UNKNOWN_INSTANCE
            other.write(run([2], (0, 4)))
            assert isinstance(await other.answer(), Result)
        assert worker.lost == []


async def test_a_parallel_device_is_busy_since_its_oldest_batch_began(
    path: Path, members: dict[int, Predictor]
) -> None:
    slow, quick = Held(members[1]), Held(members[2])
    quick.gate.set()
    async with working(Worker(shared(path), {1: slow, 2: quick}, serial=False)) as worker:
        with shared_stranger(path) as other:
            await greeted(other)
            other.write(run([1], (0, 4)))
            await until(lambda: slow.calls == 1)
            await until(lambda: worker.executor.busy_s() > 0.1)
            other.write(run([2], (0, 4)))
            assert isinstance(await other.answer(), Result)
            assert worker.executor.busy_s() > 0.1
            slow.gate.set()
            assert isinstance(await other.answer(), Result)
            await until(lambda: worker.executor.busy_s() == 0.0)


async def test_an_executor_that_stops_leaves_no_thread(path: Path, members: dict[int, Predictor]) -> None:
    """Also where batches wait: the one that runs is the last."""
    held = Held(members[1])
    async with working(Worker(shared(path), {1: held, 2: members[2]}, serial=False)) as worker:
        with shared_stranger(path) as other:
            await greeted(other)
            other.write(run([1], (0, 4)), run([1], (4, 4)))
            await until(lambda: held.calls == 1)
            worker.executor.stop()
            left = threading.Event()
            worker.executor.remove(2, left.set)
            held.gate.set()
            assert isinstance(await other.answer(), Result)
            await until(lambda: not worker.executor.is_alive())
            await until(lambda: not {"executor", "m1", "m2"} & {one.name for one in threading.enumerate()})
            assert left.is_set()
            assert held.calls == 1
