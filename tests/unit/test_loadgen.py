"""The load generator against real sockets: a server that looks the answers up, well-behaved or not."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from benchmarks import workloads
from benchmarks.answers import AnswerStream, BadAnswer, Target, request_head, v2_target
from benchmarks.children import Child, ChildFailed
from benchmarks.floor import FloorProtocol, Lookup
from benchmarks.loadgen import Window, WindowResult
from benchmarks.servers import free_port
from benchmarks.workloads import Workload

from ensemble_contract.tensors import TensorSpec

ROWS = 96
DEADLINE_S = 30.0
ProtocolFactory = Callable[[Lookup], FloorProtocol]


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    folder = tmp_path_factory.mktemp("workload")
    generator = np.random.default_rng(5)
    np.save(folder / "rows.npy", generator.standard_normal((ROWS, 64), dtype=np.float32))
    np.save(folder / "expected.npy", generator.random((ROWS, 10), dtype=np.float32))
    made = Workload("tiny", str(folder), TensorSpec("input", "FP32", (64,)), TensorSpec("p", "FP32", (10,)), (), (1,))
    (folder / "workload.json").write_bytes(msgspec.json.encode(made))
    return made


@pytest.fixture(scope="module")
def load(workload: Workload) -> Iterator[Child]:
    child = Child("benchmarks.loadgen", [workload.folder, str(os.getpid())], Path(workload.folder) / "loadgen.log")
    yield child
    child.stop()


@contextmanager
def serving(workload: Workload, factory: ProtocolFactory = FloorProtocol) -> Iterator[Target]:
    """A server on a thread of this process."""
    lookup = Lookup(workload)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: factory(lookup), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield v2_target("test", server.sockets[0].getsockname()[1], workload.model)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def ask(load: Child, target: Target, connections: int, rows: int, **more: float) -> WindowResult:
    window = Window(target, connections, rows, **{"window_s": 0.2, "warm_s": 0.02, "timeout_s": 10.0, **more})
    return load.ask(window, WindowResult, DEADLINE_S)


class Every:
    """Counts answers over all connections of a server, to treat one in so many differently."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.count = 0
        self.hits = 0

    def hit(self) -> bool:
        self.count += 1
        found = self.count % self.period == 0
        self.hits += found
        return found


@pytest.mark.parametrize(("connections", "rows"), [(1, 1), (8, 1), (64, 1), (1, 128), (4, 128), (1, 1024)])
def test_counts_and_checks_every_answer(workload: Workload, load: Child, connections: int, rows: int) -> None:
    with serving(workload) as target:
        result = ask(load, target, connections, rows)
    assert (result.failures, result.wrong, result.error) == (0, 0, "")
    assert result.requests > 0
    assert result.requests % connections == 0
    # Those before counting began, and those in flight when it stopped, are checked too.
    assert result.checked >= result.requests + connections
    assert result.rows_per_s == pytest.approx(result.requests * rows / 0.2, rel=0.5)
    assert 0 < result.p50_ms <= result.p99_ms
    assert 0 < result.cpu_share <= 1.1


def test_is_cheap_enough_to_measure_with(workload: Workload, load: Child) -> None:
    with serving(workload) as target:
        costs = [ask(load, target, 64, 1, window_s=0.5).cpu_us_per_request for _ in range(3)]
    print(f"load generator: {min(costs):.1f} µs of CPU a request")
    assert min(costs) < 30


def test_finds_wrong_values_wherever_they_are(workload: Workload, load: Child) -> None:
    every = Every(7)

    class Wrong(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            if every.hit():
                changed = np.frombuffer(answer[-4:], np.float32) + np.float32(0.001)
                answer = answer[:-4] + changed.tobytes()
            super().respond(answer)

    with serving(workload, Wrong) as target:
        result = ask(load, target, 8, 1)
    assert result.failures == 0
    assert result.wrong == every.hits > 0


def test_finds_answers_swapped_between_requests(workload: Workload, load: Child) -> None:
    class Swapped(FloorProtocol):
        last = b""

        def respond(self, answer: bytes) -> None:
            super().respond(Swapped.last or answer)
            Swapped.last = answer

    with serving(workload, Swapped) as target:
        result = ask(load, target, 1, 1)
    # The first answer is its own, and each further one is that of the request before.
    assert result.wrong == result.checked - 1 > 0


def test_counts_error_answers_and_goes_on(workload: Workload, load: Child) -> None:
    every = Every(5)

    class Full(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            body = b'{"error":"the store is full"}'
            refusal = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            super().respond(refusal if every.hit() else answer)

    with serving(workload, Full) as target:
        result = ask(load, target, 8, 1)
    assert result.failures == every.hits > 0
    assert result.wrong == 0
    assert result.requests > 0
    assert "503" in result.error
    assert "the store is full" in result.error


def test_too_many_failures_end_the_window(workload: Workload, load: Child) -> None:
    class Broken(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            super().respond(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")

    with serving(workload, Broken) as target:
        result = ask(load, target, 8, 1, window_s=60.0)
    assert result.requests == 0
    assert result.failures >= 1000
    assert "500" in result.error


def test_counts_connections_that_the_server_drops(workload: Workload, load: Child) -> None:
    every = Every(50)

    class Dropping(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            assert self.transport is not None
            if every.hits < 3 and every.hit():
                self.transport.abort()
            else:
                super().respond(answer)

    with serving(workload, Dropping) as target:
        result = ask(load, target, 8, 1)
    assert result.failures == 3
    assert "lost" in result.error
    assert result.requests > 0


def test_a_silent_server_costs_no_more_than_the_timeout(workload: Workload, load: Child) -> None:
    class Silent(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            pass

    with serving(workload, Silent) as target:
        result = ask(load, target, 4, 1, timeout_s=0.5)
    assert result.failures == 4
    assert "no answer within 0.5 s" in result.error


def test_answers_in_pieces_are_put_together(workload: Workload, load: Child) -> None:
    class Trickling(FloorProtocol):
        def respond(self, answer: bytes) -> None:
            loop = asyncio.get_running_loop()
            for step, start in enumerate(range(0, len(answer), 100)):
                loop.call_later(step * 1e-3, super().respond, answer[start : start + 100])

    with serving(workload, Trickling) as target:
        result = ask(load, target, 4, 3)
    assert (result.failures, result.wrong) == (0, 0)
    assert result.requests > 0


def test_no_server_is_a_refusal_and_the_next_window_works(workload: Workload, load: Child) -> None:
    with pytest.raises(ChildFailed, match="Connect"):
        ask(load, v2_target("nobody", free_port(), workload.model), 1, 1)
    with serving(workload) as target:
        assert ask(load, target, 1, 1).requests > 0


def answer_of(workload: Workload, rows: int) -> bytes:
    return Lookup(workload).answer(workload.rows()[:rows].tobytes())


@pytest.mark.parametrize("rows", [1, 3])
def test_an_answer_cut_anywhere_is_the_same_answer(workload: Workload, rows: int) -> None:
    whole = answer_of(workload, rows)
    stream = AnswerStream(v2_target("test", 1, workload.model), workload, rows, {})
    for cut in range(1, len(whole)):
        assert stream.feed(whole[:cut]) is None
        assert stream.feed(whole[cut:]) == workload.expected()[:rows].tobytes()
        assert stream.feed(whole) == workload.expected()[:rows].tobytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.replace(b"200 OK", b"429 Too Many Requests"), "429"),
        (lambda a: a.replace(b"Content-Length", b"Content-Lenght"), "without Content-Length"),
        (lambda a: a.replace(b'"p"', b'"q"'), "'q'"),
        (lambda a: a.replace(b"FP32", b"FP64"), "FP64"),
        (lambda a: a.replace(b"[1, 10]", b"[10, 1]"), r"\[10, 1\]"),
        (lambda a: a + b"HTTP/1.1 200 OK\r\n", "more bytes"),
        (lambda a: a.replace(b'{"model_name"', b'[{"model_name'), "not a V2 header"),
    ],
)
def test_what_was_not_asked_for_is_refused(workload: Workload, change: Callable[[bytes], bytes], says: str) -> None:
    stream = AnswerStream(v2_target("test", 1, workload.model), workload, 1, {})
    changed = change(answer_of(workload, 1))
    with pytest.raises(BadAnswer, match=says):
        stream.feed(changed)


def test_an_answer_of_a_part_of_the_members_is_refused(workload: Workload) -> None:
    text = {"outputs": [{"name": "p", "datatype": "FP32", "shape": [1, 10], "parameters": {"binary_data_size": 40}}]}
    text["parameters"] = {"members_missing": "b"}  # type: ignore[assignment]
    header = json.dumps(text).encode()
    lengths = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d" % (len(header), len(header) + 40)
    stream = AnswerStream(v2_target("test", 1, workload.model), workload, 1, {})
    with pytest.raises(BadAnswer, match="members are missing"):
        stream.feed(b"HTTP/1.1 200 OK\r\n" + lengths + b"\r\n\r\n" + header + bytes(40))


def test_the_request_is_what_the_stock_client_would_send(workload: Workload) -> None:
    import tritonclient.http as triton

    rows = workload.rows()[:2]
    tensor = triton.InferInput("input", [2, 64], "FP32")
    tensor.set_data_from_numpy(rows)
    body, length = triton.InferenceServerClient.generate_request_body(
        [tensor], outputs=[triton.InferRequestedOutput("p")]
    )
    head, _, text = request_head(v2_target("test", 1, "bench-tiny"), workload, 2).partition(b"\r\n\r\n")
    assert json.loads(text) == json.loads(body[:length])
    assert f"Inference-Header-Content-Length: {len(text)}".encode() in head
    assert f"Content-Length: {len(text) + rows.nbytes}".encode() in head
    assert head.startswith(b"POST /v2/models/bench-tiny/infer HTTP/1.1\r\n")


def test_a_raw_target_gets_the_tensor_alone(workload: Workload) -> None:
    head, _, text = request_head(Target("peer", 1, "/inference", form="raw"), workload, 2).partition(b"\r\n\r\n")
    assert text == b""
    assert b"Content-Length: 512" in head
    assert b"Inference-Header" not in head


def test_matches_is_strict() -> None:
    expected = np.array([[0.5, 0.5], [0.1, 0.9], [0.2, 0.8]], dtype=np.float32)
    given = expected.copy()
    given[1, 0] += 1e-3
    given[2, 1] = np.nan
    assert workloads.matches(given, expected).tolist() == [True, False, False]
