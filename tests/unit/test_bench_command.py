"""The load of `ensemble bench`: its arithmetic in tables, its loops against real servers on sockets of this machine."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.load.answer_stream import Answer, AnswerStream, Known, NotHttp
from ensemble_operator.load.bench import Bench, Prediction
from ensemble_operator.load.latencies import Latencies
from ensemble_operator.load.loadgen import event_loop, generate
from ensemble_operator.load.loads import Line, Load, Result, due_times, requests_of
from ensemble_operator.load.report import bench_document, bench_table, headline, remarks
from ensemble_operator.load.target import Target, TargetUnusable, find_target, inputs_of

X = TensorSpec("x", "FP32", (3,))
OK = b'{"model_name":"m","outputs":[]}'
PARTIAL = b'{"model_name":"m","parameters":{"members_missing":"b"},"outputs":[]}'


def answer(header: bytes = OK, tensors: bytes = b"\0" * 12, status: str = "200 OK", more: str = "") -> bytes:
    lines = f"HTTP/1.1 {status}\r\nContent-Length: {len(header) + len(tensors)}\r\n"
    return f"{lines}Inference-Header-Content-Length: {len(header)}\r\n{more}\r\n".encode() + header + tensors


def error(status: str, message: str) -> bytes:
    body = json.dumps({"error": message}).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def load(port: int = 1, **changes: Any) -> Load:
    small = {"clients": 2, "rows": 1, "duration_s": 0.5, "warmup_s": 0.1, "timeout_s": 5.0}
    return Load(host="127.0.0.1", port=port, model="m", inputs=(X,), **{**small, **changes})


class TestAnswerStream:
    @pytest.mark.parametrize("step", [1, 7, 1000])
    def test_however_the_bytes_come(self, step: int) -> None:
        stream = AnswerStream(Known())
        messages = [
            answer(),
            answer(PARTIAL),
            error("503 Busy", "the store is full"),
            answer(more="Connection: close\r\n"),
        ]
        found = []
        for message in messages:
            parts = [stream.feed(message[i : i + step]) for i in range(0, len(message), step)]
            assert parts[:-1] == [None] * (len(parts) - 1)
            found.append(parts[-1])
        assert found == [
            Answer(200, False, False),
            Answer(200, True, False),
            Answer(503, False, False, "the store is full"),
            Answer(200, False, True),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"SSH-2.0-OpenSSH\r\n\r\n", "not an answer of HTTP/1.1"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "without Content-Length"),
            (answer() + b"x", "more bytes than the answer has"),
            (b"x" * 70_000, "no end of the headers"),
        ],
        ids=["not http", "chunked", "too much", "endless"],
    )
    def test_what_it_does_not_understand(self, text: bytes, message: str) -> None:
        with pytest.raises(NotHttp, match=message):
            AnswerStream(Known()).feed(text)


def test_percentiles_are_those_of_all_values() -> None:
    values = np.random.default_rng(1).lognormal(-6, 1.5, 20_000)
    latencies = Latencies()
    for value in values:
        latencies.add(float(value))
    for percent in (50, 90, 99, 99.9):
        assert latencies.percentile_s(percent) == pytest.approx(np.percentile(values, percent), rel=0.006)
    assert latencies.longest_s == values.max()
    assert Latencies().percentile_s(99) == 0.0


def test_requests_are_v2_and_differ() -> None:
    messages = requests_of(load(rows=5))
    assert len(set(messages)) == len(messages) == 64
    head, _, body = messages[0].partition(b"\r\n\r\n")
    fields = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    length = int(fields["Inference-Header-Content-Length"])
    assert int(fields["Content-Length"]) == len(body)
    (tensor,) = json.loads(body[:length])["inputs"]
    assert tensor["shape"] == [5, 3]
    assert tensor["parameters"]["binary_data_size"] == len(body) - length == 60
    assert requests_of(load(rows=5)) == messages
    assert len(requests_of(load(rows=1_000_000))) == 5


def test_arrivals() -> None:
    steady = due_times(load(rate_per_s=100.0, arrivals="constant"))
    assert [next(steady) for _ in range(3)] == pytest.approx([0.01, 0.02, 0.03])
    random = due_times(load(rate_per_s=100.0))
    gaps = np.diff([next(random) for _ in range(20_000)])
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(0.01, rel=0.05)


Respond = Callable[[int], Awaitable[bytes]]


@asynccontextmanager
async def server(respond: Respond) -> AsyncIterator[int]:
    """A server that answers request number n with `respond(n)`, and hangs up where that is empty; its port."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
                await reader.readexactly(int(length.split()[1]))
                count += 1
                text = await respond(count)
                if not text:
                    break
                writer.write(text)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def under(respond: Respond, **changes: Any) -> Result:
    lines: list[Line] = []
    async with server(respond) as port:
        return await asyncio.wait_for(generate(load(port, **changes), lines.append), 20)


async def prompt(number: int) -> bytes:
    return answer(PARTIAL if number % 2 else OK)


async def slow(number: int) -> bytes:
    await asyncio.sleep(0.05)
    return answer()


class TestLoops:
    async def test_closed(self) -> None:
        result = await under(slow, clients=4, rows=3)
        assert result.failures == {}
        assert 4 * 3 / 0.05 * 0.5 < result.rows_per_s <= 4 * 3 / 0.05 * 1.2
        assert 50 <= result.p50_ms < 100
        assert result.rows_per_s == pytest.approx(3 * result.requests_per_s)

    async def test_partial_answers_are_counted(self) -> None:
        result = await under(prompt)
        assert 0 < result.partial < result.requests

    async def test_open(self) -> None:
        result = await under(prompt, rate_per_s=200.0, arrivals="constant", clients=8)
        assert result.failures == {}
        assert 95 <= result.requests <= 105

    async def test_open_latency_counts_from_when_a_request_was_due(self) -> None:
        """One client and 50 ms a request: of 40 requests/s every second one waits for all before it."""
        result = await under(slow, rate_per_s=40.0, arrivals="constant", clients=1)
        assert result.p50_ms > 100
        assert set(result.failures) == {"never sent"}
        assert 15 <= result.requests + result.failures["never sent"] <= 21

    async def test_errors_and_lost_connections_are_told_apart(self) -> None:
        async def unsteady(number: int) -> bytes:
            await asyncio.sleep(0.002)
            if number % 10 == 3:
                return b""
            return error("503 Busy", "the store is full") if number % 10 == 5 else answer()

        result = await under(unsteady, duration_s=1.0)
        assert set(result.failures) == {"HTTP 503", "connection lost"}
        assert min(result.failures.values()) >= 2
        assert result.requests > 10

    async def test_no_answer_is_a_failure_by_its_deadline(self) -> None:
        async def stuck(number: int) -> bytes:
            if number > 1:
                await asyncio.sleep(30)
            return answer()

        result = await under(stuck, warmup_s=0.0, timeout_s=0.3)
        assert set(result.failures) == {"no answer"}
        assert result.requests == 0

    async def test_a_refused_first_request_ends_it(self) -> None:
        async def refusing(number: int) -> bytes:
            return error("413 Too Large", "rows over the store")

        result = await under(refusing)
        assert result.refused == "the first request failed: HTTP 413: rows over the store"

    async def test_nobody_listens(self) -> None:
        async with server(prompt) as port:
            pass
        result = await generate(load(port), lambda line: None)
        assert result.refused.startswith(f"no connection to 127.0.0.1:{port}")

    def test_the_timers_of_an_open_loop_are_finer_than_a_millisecond(self) -> None:
        with asyncio.Runner(loop_factory=lambda: event_loop(load(rate_per_s=1000.0))) as runner:
            result = runner.run(under(prompt, rate_per_s=1000.0, arrivals="constant", clients=16))
        assert result.failures == {}
        assert 450 <= result.requests <= 550


class TestTarget:
    async def test_nothing_there(self) -> None:
        async with server(prompt) as port:
            pass
        with pytest.raises(TargetUnusable, match="does the server run there"):
            await find_target(f"http://127.0.0.1:{port}", None)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("https://127.0.0.1:1", "http only"),
            ("http://127.0.0.1:99999", "not a URL"),
            ("http://:1", "an address like"),
            ("http://127.0.0.1:1/v1/models/m", "the path of a model is /v2/models/NAME"),
        ],
    )
    async def test_not_an_address(self, url: str, message: str) -> None:
        with pytest.raises(TargetUnusable, match=message):
            await find_target(url, None)

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ([], "did not answer with V2 metadata"),
            ({"inputs": []}, "has no inputs"),
            ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]}, "only the first dimension"),
            ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}]}, "only the first dimension"),
            ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [-1, 1]}]}, "no random rows"),
            ({"inputs": [{"name": "x", "shape": [-1]}]}, "did not answer with V2 metadata"),
        ],
    )
    def test_metadata_that_is_none(self, metadata: object, message: str) -> None:
        with pytest.raises(TargetUnusable, match=message):
            inputs_of(metadata, "here")


class TestReport:
    RESULT = Result(
        requests=90, rows_per_s=80.0, requests_per_s=80.0, p50_ms=10.0, failures={"HTTP 503": 3}, example="full"
    )

    def bench(self, predicted: float | None) -> Bench:
        prediction = Prediction(predicted, batch_rows=128) if predicted else None
        return Bench(Target("::1", 8000, "m", (X,)), load(), self.RESULT, prediction)

    def test_predicted_against_measured(self) -> None:
        table = bench_table(self.bench(200.0))
        first = [next(iter(column.cells)) for column in table.columns]
        assert first == ["rows/s", "200.0", "80.0", "40%"]
        assert remarks(self.bench(200.0)) == [
            "3 requests failed: HTTP 503",
            "the first said: full",
            "2 rows under way at most, and full batches take 128: more --clients or --rows come closer",
        ]

    def test_without_a_plan(self) -> None:
        assert len(bench_table(self.bench(None)).columns) == 2
        assert headline(self.bench(None)) == "http://[::1]:8000/v2/models/m: 2 clients, 1 row a request, for 0.5 s"
        document = bench_document(self.bench(None))
        assert "predictedRowsPerS" not in document
        assert json.loads(json.dumps(document))["failures"] == {"HTTP 503": 3}
