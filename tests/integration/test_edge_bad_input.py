"""Whatever a client sends: the right status, a message that says what is wrong, and the next request works."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from ensemble_contract.plan import ServedMember
from tests.support.data_plane import LocalGateway, Workers, serving
from tests.support.http_client import Client, infer, post, rows
from tests.support.plane_members import TIMES


@pytest.fixture
async def edge(workers: Workers) -> AsyncIterator[LocalGateway]:
    async with serving(workers.plan(*TIMES)) as found:
        yield found


@pytest.fixture
async def client(edge: LocalGateway) -> AsyncIterator[Client]:
    async with await edge.connect() as found:
        yield found


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [0.0] * 8, **changes}


def request(*inputs: dict[str, Any], **more: Any) -> bytes:
    return post(json.dumps({"inputs": list(inputs), **more}).encode())


def binary(size: object, *, sent: int = 32, shape: tuple[int, ...] = (1, 8)) -> bytes:
    part = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [part]}).encode()
    return post(text + bytes(sent), Inference_Header_Content_Length=len(text))


ONE = request(tensor())
BAD = {
    "unknown model": (
        post(b"{}", target="/v2/models/cats/infer"),
        404,
        "model 'cats' is not served here: ask for echo",
    ),
    "unknown member": (post(b"{}", target="/v2/models/echo.x/infer"), 404, "model 'echo.x' is not served"),
    "unknown version": (post(b"{}", target="/v2/models/echo/versions/9/infer"), 404, "its version is '1'"),
    "empty body": (post(b""), 400, "the body is empty"),
    "no JSON": (post(b"cat.jpg"), 400, "the request's JSON cannot be read"),
    "half JSON": (post(ONE.partition(b"\r\n\r\n")[2][:-3]), 400, "the request's JSON cannot be read"),
    "JSON of another kind": (post(b"[1, 2]"), 400, "expected object, got array"),
    "no inputs": (post(b"{}"), 400, "inputs"),
    "no input": (request(), 400, "input 'x' is missing"),
    "wrong name": (request(tensor(name="image")), 400, "unknown input 'image': model 'echo' has the inputs x"),
    "wrong datatype": (request(tensor(datatype="FP64")), 400, "datatype 'FP64' does not match FP32"),
    "wrong shape": (request(tensor(shape=[1, 9])), 400, "shape [1, 9] does not match [rows, 8]"),
    "wrong rank": (request(tensor(shape=[8])), 400, "shape [8] does not match [rows, 8]"),
    "shape of text": (request(tensor(shape="1,8")), 400, "shape must be a list of integers"),
    "too few elements": (request(tensor(data=[0.0] * 7)), 400, "data has 7 elements, shape [1, 8] takes 8"),
    "too many elements": (request(tensor(data=[0.0] * 9)), 400, "data has 9 elements"),
    "ragged": (request(tensor(shape=[2, 8], data=[[0.0] * 9, [0.0] * 7])), 400, "data is ragged"),
    "text in data": (request(tensor(data=["a"] * 8)), 400, "element 0 of data is not a number"),
    "null in data": (request(tensor(data=[0.0] * 7 + [None])), 400, "data is not a number"),
    "NaN in JSON": (post(ONE.partition(b"\r\n\r\n")[2].replace(b"[0.0", b"[NaN", 1)), 400, "NaN"),
    "beyond FP32": (request(tensor(data=[1e300] + [0.0] * 7)), 400, "element 0 of data is too large for FP32"),
    "no data": (request({k: v for k, v in tensor().items() if k != "data"}), 400, "neither data nor"),
    "empty batch": (request(tensor(shape=[0, 8], data=[])), 400, "0 rows: a request has at least one"),
    "negative rows": (request(tensor(shape=[-1, 8])), 400, "-1 rows: a request has at least one"),
    "ten million rows": (request(tensor(shape=[10_000_000, 8], data=[])), 413, "10000000 rows are over the limit"),
    "twice": (request(tensor(), tensor()), 400, "input 'x' is given twice"),
    "unknown output": (
        request(tensor(), outputs=[{"name": "z"}]),
        400,
        "unknown output 'z': model 'echo' has the outputs y",
    ),
    "output twice": (request(tensor(), outputs=[{"name": "y"}] * 2), 400, "output 'y' is requested twice"),
    "quorum of none": (request(tensor(), parameters={"quorum": 0}), 400, "quorum"),
    "quorum of too many": (request(tensor(), parameters={"quorum": 4}), 400, "'quorum': 4 is not in 1..3"),
    "timeout of text": (request(tensor(), parameters={"timeout": "soon"}), 400, "parameters.timeout"),
    "sequence": (request(tensor(), parameters={"sequence_id": 7}), 400, "sequences are not served"),
    "shared memory": (
        request(tensor(parameters={"shared_memory_region": "r"})),
        400,
        "shared memory regions are not served",
    ),
    "negative binary size": (binary(-1), 400, "binary_data_size"),
    "huge binary size": (binary(1 << 62), 400, "does not match shape [1, 8] of FP32, which takes 32 bytes"),
    "binary size of text": (binary("32"), 400, "binary_data_size"),
    "binary part too short": (binary(32, sent=31), 400, "the binary part of the body has 31 bytes"),
    "binary part too long": (binary(32, sent=33), 400, "the binary part of the body has 33 bytes"),
    "header beyond body": (post(b"{}", Inference_Header_Content_Length=3), 400, "3 is not within the body"),
    "negative header": (post(b"{}", Inference_Header_Content_Length=-2), 400, "is not within the body"),
    "header of text": (post(b"{}", Inference_Header_Content_Length="two"), 400, "is not a number of bytes"),
    "raw, but no whole row": (post(bytes(33), Inference_Header_Content_Length=0), 400, "not a whole number of rows"),
    "wrong content type": (post(b"{}", Content_Type="image/png"), 415, "Content-Type 'image/png' is not served"),
    "wrong encoding": (post(b"{}", Content_Encoding="br"), 415, "Content-Encoding 'br' is not served"),
    "not gzip": (post(b"{}", Content_Encoding="gzip"), 400, "the body is not gzip"),
    "deep JSON": (post(b'{"inputs": ' + b"[" * 100_000), 400, "the request's JSON"),
    "NUL in the name": (post(b"{}", target="/v2/models/%00/infer"), 404, "is not served here"),
    "no UTF-8 in the name": (post(b"{}", target="/v2/models/%ff/infer"), 404, "is not served here"),
    "wrong method": (post(b"{}").replace(b"POST", b"PUT"), 405, "PUT is not for '/v2/models/echo/infer': use POST"),
    "no such path": (post(b"{}", target="/v1/models/echo:predict"), 404, "no such path '/v1/models/echo:predict'"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_input(edge: LocalGateway, client: Client, what: str) -> None:
    """Twice, because what was refused once must not be remembered wrongly; the connection stays usable."""
    bad, status, message = BAD[what]
    x = rows(2)
    for _ in range(2):
        reply = await client.ask(bad)
        assert (reply.status, message in reply.error) == (status, True), reply
        assert len(reply.error) < 1000
        np.testing.assert_allclose((await client.ask(infer(x))).y(), 2 * x, rtol=1e-5)
    assert edge.gateway.pipeline.engine.store.used_rows == 0


async def test_a_full_store_refuses_and_says_when_to_come_back(workers: Workers) -> None:
    """A member that no worker has keeps every row until its deadline."""
    plan = workers.plan(*TIMES, max_queue_bytes=100 * (32 + 4 * 32), timeout_s=2.0)
    plan = msgspec.structs.replace(plan, members=(*plan.members, ServedMember("absent", "no digest")))
    async with serving(plan, wait=False) as local:
        first, second, third = [await local.connect() for _ in range(3)]
        reply = await third.ask(infer(rows(101)))
        assert reply.status == 413
        assert "100" in reply.error
        first.send(infer(rows(60)))
        second.send(infer(rows(40)))
        while local.gateway.pipeline.engine.store.used_rows < 100:
            await asyncio.sleep(0.001)
        reply = await third.ask(infer(rows(1)))
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert "the queue is full (100 of 100 rows)" in reply.error
        for client in (first, second):
            reply = await client.reply()
            assert reply.status == 503
            assert "no live instance of absent" in reply.error
        assert local.gateway.pipeline.engine.store.used_rows == 0
