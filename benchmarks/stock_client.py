"""The load of an application: one stock `tritonclient`, one request at a time, after a metadata call on its connection.

`python -m benchmarks.stock_client FOLDER PARENT_PID` answers `Window`s as `loadgen` does.
"""

from __future__ import annotations

import sys
import time
from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.http as triton

from benchmarks import workloads
from benchmarks.children import answer_lines
from benchmarks.loadgen import Window, WindowResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.workloads import Array, Workload


def measure(window: Window, workload: Workload, inputs: Array, expected: Array) -> WindowResult:
    """Requests in turn for a window; each answer is compared after the window."""
    client = triton.InferenceServerClient(
        f"{window.target.host}:{window.target.port}", concurrency=1, network_timeout=window.timeout_s
    )
    try:
        client.get_model_metadata(workload.model)
        warm_until = time.perf_counter() + window.warm_s
        number = 0
        while number < 1 or time.perf_counter() < warm_until:
            _infer(client, workload, _rows(inputs, number, window.rows))
            number += 1
        latencies_s = array("d")
        answers: list[tuple[int, Array]] = []
        started = now = time.perf_counter()
        cpu_started = time.process_time()
        while not latencies_s or now - started < window.window_s:
            sent = now
            answers.append((number, _infer(client, workload, _rows(inputs, number, window.rows))))
            now = time.perf_counter()
            latencies_s.append(now - sent)
            number += 1
        cpu_s = time.process_time() - cpu_started
    finally:
        client.close()
    wrong = sum(not workloads.matches(a[None], _rows(expected, n, window.rows)[None])[0] for n, a in answers)
    p50, p99 = np.percentile(np.asarray(latencies_s) * 1e3, (50, 99))
    return WindowResult(
        requests=len(answers),
        rows_per_s=len(answers) * window.rows / (now - started),
        p50_ms=float(p50),
        p99_ms=float(p99),
        failures=0,
        wrong=wrong,
        checked=len(answers),
        cpu_share=cpu_s / (now - started),
        cpu_us_per_request=cpu_s / len(answers) * 1e6,
    )


def _rows(pool: Array, number: int, rows: int) -> Array:
    return pool[np.arange(number, number + rows) % len(pool)]


def _infer(client: Any, workload: Workload, rows: Array) -> Array:
    tensor = triton.InferInput(workload.input.name, list(rows.shape), workload.input.datatype)
    tensor.set_data_from_numpy(rows)
    result = client.infer(workload.model, [tensor], outputs=[triton.InferRequestedOutput(workload.output.name)])
    return np.asarray(result.as_numpy(workload.output.name))


def main(arguments: Sequence[str]) -> None:
    """Answer windows until stdin closes."""
    folder, parent_pid = arguments
    workload = workloads.read(folder)
    inputs, expected = workload.rows(), workload.expected()
    answer_lines(Window, lambda window: measure(window, workload, inputs, expected), int(parent_pid))


if __name__ == "__main__":
    main(sys.argv[1:])
