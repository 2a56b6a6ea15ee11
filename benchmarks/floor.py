"""A V2 server without a model: it looks the answers up. What it reaches under the load is what HTTP costs by itself.

`python -m benchmarks.floor` measures it with the load generator, each in a process of its own. Its figures bound what
any server on the same event loop can reach, and show that the load generator is not what limits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import uvloop

from benchmarks import loads, preparation, workloads
from benchmarks.answers import v2_target
from benchmarks.children import START_TIMEOUT_S, Child
from benchmarks.loadgen import Window, WindowResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

    from benchmarks.workloads import Workload

_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n")
_JSON_LENGTH = re.compile(rb"\r\nInference-Header-Content-Length: (\d+)\r\n")


class Lookup:
    """The right answer for any rows of a workload's pool."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._row_bytes = workload.input.row_bytes
        answers = np.ascontiguousarray(workload.expected())
        self._answers: dict[bytes, bytes] = {
            row.tobytes(): answer.tobytes() for row, answer in zip(workload.rows(), answers, strict=True)
        }
        self._heads: dict[int, bytes] = {}

    def answer(self, tensor: bytes) -> bytes:
        """A whole HTTP answer for rows of the pool."""
        rows = len(tensor) // self._row_bytes
        if rows not in self._heads:
            self._heads[rows] = self._head(rows)
        if rows == 1:
            return self._heads[1] + self._answers[tensor]
        step = self._row_bytes
        return self._heads[rows] + b"".join(self._answers[tensor[i : i + step]] for i in range(0, len(tensor), step))

    def _head(self, rows: int) -> bytes:
        output = self._workload.output
        size = rows * output.row_bytes
        tensor = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": [rows, *output.shape],
            "parameters": {"binary_data_size": size},
        }
        text = json.dumps({"model_name": self._workload.model, "model_version": "1", "outputs": [tensor]}).encode()
        lengths = f"Inference-Header-Content-Length: {len(text)}\r\nContent-Length: {len(text) + size}\r\n\r\n"
        return b"HTTP/1.1 200 OK\r\n" + lengths.encode() + text


class FloorProtocol(asyncio.Protocol):
    """Reads one request at a time and answers it at once."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._pending = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer when the request is whole."""
        self._pending = request = self._pending + data if self._pending else data
        end = request.find(b"\r\n\r\n") + 4
        length = _LENGTH.search(request, 0, end)
        if end < 4 or length is None or len(request) < end + int(length[1]):
            return
        header = _JSON_LENGTH.search(request, 0, end)
        assert header is not None
        self._pending = b""
        self.respond(self._lookup.answer(request[end + int(header[1]) :]))

    def respond(self, answer: bytes) -> None:
        """Send an answer."""
        assert self.transport is not None
        self.transport.write(answer)


async def serve(workload: Workload, ports: Connection) -> None:
    """Serve on a free port, which is told to `ports`, until the process ends."""
    lookup = Lookup(workload)
    server = await asyncio.get_running_loop().create_server(lambda: FloorProtocol(lookup), "127.0.0.1", 0)
    ports.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _serve(workload: Workload, ports: Connection) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(workload, ports))


def measure(workload: Workload, asked: Sequence[loads.Load], window_s: float) -> list[WindowResult]:
    """One window for each load."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    server = spawn.Process(target=_serve, args=(workload, theirs), daemon=True)
    server.start()
    load = Child(
        "benchmarks.loadgen", [workload.folder, str(os.getpid())], Path(workload.folder) / "logs" / "floor.log"
    )
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise TimeoutError("the server without a model did not start")
        target = v2_target("floor", ours.recv(), workload.model)
        return [
            load.ask(Window(target, one.connections, one.rows, window_s), WindowResult, START_TIMEOUT_S)
            for one in asked
        ]
    finally:
        load.stop()
        server.terminate()
        server.join()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each load. 0 if every answer was right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=__doc__)
    parser.add_argument("--window-s", type=float, default=1.0, help="seconds a window (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=workloads.CACHE, help="where models are kept (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    results = measure(preparation.prepare("tiny", given.cache), loads.LOADS, given.window_s)
    for load, result in zip(loads.LOADS, results, strict=True):
        print(
            f"{load.name:>14}: {result.rows_per_s:10,.0f} rows/s, "
            f"p50 {result.p50_ms:.3f} ms, p99 {result.p99_ms:.3f} ms, "
            f"load generator {result.cpu_us_per_request:.1f} µs a request, {result.cpu_share:.0%} of a core; "
            f"{result.checked} checked, {result.wrong} wrong, {result.failures} failed {result.error}"
        )
    return int(any(result.wrong or result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
