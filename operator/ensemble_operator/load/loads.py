"""What crosses between `ensemble bench` and its load generator, and the requests that a load consists of. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from ensemble_contract.tensors import FLOATING, TensorSpec, fp32_to_bf16

MAX_DIFFERENT_REQUESTS = 64
MAX_PREPARED_BYTES = 64 << 20


class Load(msgspec.Struct, frozen=True, rename="camel"):
    """A load on one model. With `rate_per_s` (requests) 0 the loop is closed: a client asks when it has its answer.

    Otherwise requests fall due whether or not others are answered, evenly (`constant`) or at random (`poisson`), and
    the `clients` are the most that are under way at a time. Nothing is counted in the first `warmup_s`.
    """

    host: str
    port: int
    model: str
    inputs: tuple[TensorSpec, ...]
    clients: int
    rows: int
    duration_s: float
    rate_per_s: float = 0.0
    arrivals: str = "poisson"
    warmup_s: float = 1.0
    timeout_s: float = 30.0
    seed: int = 0


class Result(msgspec.Struct, frozen=True, rename="camel"):
    """What came of a load.

    Latencies are of requests that fell due in the window, from the due time to the whole answer; `rows_per_s` counts
    answers that came in it. `failures` has the number of requests by reason, `partial` the answers that lack members.
    `cpu_share` is the generator's own: near 1 it is what limits. `refused` says why no load was possible at all.
    """

    requests: int = 0
    rows_per_s: float = 0.0
    requests_per_s: float = 0.0
    mean_ms: float = 0.0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0
    failures: dict[str, int] = {}
    example: str = ""
    partial: int = 0
    cpu_share: float = 0.0
    refused: str = ""


class Progress(msgspec.Struct, frozen=True, rename="camel"):
    """How far a load is: the seconds since it began, and what was answered since the last time."""

    elapsed_s: float
    rows_per_s: float
    failures: int


class Line(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A line that the load generator prints."""

    progress: Progress | None = None
    result: Result | None = None


def requests_of(load: Load) -> list[bytes]:
    """Different requests, each as the bytes of its HTTP message, with random rows; the same for the same seed."""
    row_bytes = sum(spec.row_bytes for spec in load.inputs)
    count = max(1, min(MAX_DIFFERENT_REQUESTS, MAX_PREPARED_BYTES // max(1, row_bytes * load.rows)))
    generator = np.random.default_rng(load.seed)
    head = _head(load, row_bytes * load.rows)
    return [
        head + b"".join(random_rows(spec, load.rows, generator).tobytes() for spec in load.inputs) for _ in range(count)
    ]


def random_rows(spec: TensorSpec, rows: int, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[Any]]:
    """Rows of an input: normal numbers, images' bytes, and small numbers where they may be indices."""
    shape = (rows, *spec.shape)
    if spec.datatype == "BF16":
        return fp32_to_bf16(generator.standard_normal(shape, dtype=np.float32))
    if spec.datatype in FLOATING:
        return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    return generator.integers(0, 256 if spec.datatype == "UINT8" else 2, shape).astype(spec.dtype)


def due_times(load: Load) -> Iterator[float]:
    """When requests of an open loop fall due, in seconds from its begin, without end."""
    generator = np.random.default_rng(load.seed)
    now = 0.0
    while True:
        if load.arrivals == "constant":
            now += 1 / load.rate_per_s
        else:
            now -= math.log(1 - generator.random()) / load.rate_per_s
        yield now


def _head(load: Load, body_bytes: int) -> bytes:
    tensors = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": [load.rows, *spec.shape],
            "parameters": {"binary_data_size": load.rows * spec.row_bytes},
        }
        for spec in load.inputs
    ]
    header = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    text = json.dumps(header, separators=(",", ":")).encode()
    host = f"[{load.host}]" if ":" in load.host else load.host
    lines = (
        f"POST /v2/models/{load.model}/infer HTTP/1.1",
        f"Host: {host}:{load.port}",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(text)}",
        f"Content-Length: {len(text) + body_bytes}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + text
