"""The gateway's routes on a real socket, over a pipeline that computes its members in place, with numpy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from aiohttp import web

from ensemble_contract.plan import GatewayPlan, ServedMember
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.combiner import make_rule
from ensemble_gateway.metrics import Gauges, Metrics, model_index
from ensemble_gateway.request import Answer, Array, InferHeader, Model, RequestError
from ensemble_gateway.routes import make_app, make_runner
from ensemble_gateway.served import served_models

DEADLINE_S = 20
MAX_BODY_BYTES = 200_000
MAX_ROWS = 4096
FEATURES, CLASSES = 6, 4
WEIGHTS = {
    name: np.random.default_rng(seed).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    for seed, name in enumerate(("small", "big"))
}


class InPlacePipeline:
    """Members are linear maps, computed at once; `late` holds every request until its client leaves."""

    def __init__(self) -> None:
        self.plan = GatewayPlan(
            generation=1,
            ensemble="pets",
            inputs=(TensorSpec("x", "FP32", (FEATURES,)),),
            outputs=(TensorSpec("y", "FP32", (CLASSES,)),),
            members=(ServedMember("small", "d1", format="onnx"), ServedMember("big", "d2", version="7")),
            workers=(),
            labels={"y": ("cat", "dog", "fish", "bird")},
            timeout_s=1,
        )
        self.models: dict[str, Model] = served_models(self.plan)
        self.ready = True
        self.live = [True, True]
        self.late = False
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()
        self.rule = make_rule(self.plan.rule, [1.0, 1.0])
        gauges = Gauges(lambda: 0, lambda: 0, lambda: 1 << 20, lambda _: 0, lambda _: 1)
        self.metrics = Metrics(self.models.values(), gauges)

    def member_live(self, index: int) -> bool:
        return self.live[index]

    def max_rows(self, model: Model) -> int:
        return MAX_ROWS

    async def infer(self, header: InferHeader, binary: memoryview) -> Answer:
        if self.late:
            self.arrived.set()
            try:
                await asyncio.sleep(DEADLINE_S)
            except asyncio.CancelledError:
                self.left.set()
                raise
        if not all(self.live):
            raise RequestError(503, "member 'big' has no live instance", retry_after_s=2)
        part = header.inputs[0]
        x = part.array if part.array is not None else np.frombuffer(binary[part.start : part.stop], "<f4")
        x = x.reshape(header.rows, FEATURES)
        outputs = [x @ weights for weights in WEIGHTS.values()]
        for index in range(2):
            self.metrics.batch_done(index, header.rows, queue_s=0.0, compute_s=0.001)
        self.metrics.request_done(model_index(header.model), header.rows, duration_s=0.002)
        if header.model.member is not None:
            return Answer({"y": outputs[header.model.member]}, used=(tuple(WEIGHTS)[header.model.member],))
        return Answer({"y": self.rule.combine(np.stack(outputs), (0, 1))}, used=("small", "big"))


class Server:
    """Where the routes are served, and the pipeline behind them."""

    def __init__(self, pipeline: InPlacePipeline, port: int) -> None:
        self.pipeline = pipeline
        self.port = port
        self.url = f"http://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    """The routes on a free port of 127.0.0.1."""
    pipeline = InPlacePipeline()
    runner = make_runner(make_app(lambda: pipeline, max_body_bytes=lambda: MAX_BODY_BYTES), shutdown_timeout_s=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Server(pipeline, runner.addresses[0][1])
    finally:
        await runner.cleanup()


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def combined(x: Array) -> Array:
    return (x @ WEIGHTS["small"] + x @ WEIGHTS["big"]) / 2


def json_request(x: Array, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}], **more}
