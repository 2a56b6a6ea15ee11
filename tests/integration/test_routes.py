"""The routes over real sockets, asked by tritonclient (sync in a process of its own, and aio), aiohttp and raw bytes.

The pipeline behind them computes its members in place, with numpy and the real combination rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import pytest
import tritonclient.http.aio as triton
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from ensemble_gateway.metrics import ENSEMBLE, Failure
from ensemble_gateway.offloop import OFF_LOOP_BYTES
from tests.support.in_place_gateway import (
    CLASSES,
    DEADLINE_S,
    FEATURES,
    MAX_BODY_BYTES,
    MAX_ROWS,
    WEIGHTS,
    Server,
    combined,
    json_request,
    rows,
    serving,
)

TOO_MANY_ROWS = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [4097, 6], "data": []}]}'


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    plain = {"Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False, headers=plain) as client:
        yield client


async def raw(server: Server, head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    await writer.drain()
    return reader, writer


async def test_tritonclient_aio_works_unmodified(server: Server) -> None:
    x = rows(3)
    async with triton.InferenceServerClient(f"127.0.0.1:{server.port}", conn_timeout=DEADLINE_S) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("pets.big", "7")
        assert {"statistics", "binary_tensor_data"} <= set((await client.get_server_metadata())["extensions"])
        for binary_in in (False, True):
            for binary_out in (False, True):
                for encoding in (None, "gzip", "deflate"):
                    tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=binary_in)
                    result = await client.infer(
                        "pets",
                        [tensor],
                        outputs=[triton.InferRequestedOutput("y", binary_data=binary_out)],
                        request_id="seven",
                        request_compression_algorithm=encoding,
                        response_compression_algorithm=encoding,
                    )
                    np.testing.assert_allclose(result.as_numpy("y"), combined(x), rtol=1e-4, atol=1e-6)
                    assert result.get_response()["id"] == "seven"
        result = await client.infer("pets.small", [tensor])
        np.testing.assert_allclose(result.as_numpy("y"), x @ WEIGHTS["small"], rtol=1e-4, atol=1e-6)
        result = await client.infer("pets", [tensor], outputs=[triton.InferRequestedOutput("y", class_count=1)])
        best = result.as_numpy("y")[0][0].decode()
        assert best.endswith(":" + ("cat", "dog", "fish", "bird")[int(np.argmax(combined(x)[0]))])
        with pytest.raises(InferenceServerException, match=r"ask for pets, pets\.small, pets\.big") as error:
            await client.infer("cats", [tensor])
        assert error.value.status() == "404"
        with pytest.raises(InferenceServerException, match="its version is '7'"):
            await client.get_model_metadata("pets.big", "8")


SYNC_CLIENT = """
import json, sys
import numpy as np
import tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1], connection_timeout=20, network_timeout=20)
x = np.array(json.loads(sys.argv[2]), dtype=np.float32)
tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
result = client.infer("pets", [tensor], request_compression_algorithm="gzip", response_compression_algorithm="gzip")
print(json.dumps({
    "live": [client.is_server_live(), client.is_server_ready(), client.is_model_ready("pets")],
    "server": client.get_server_metadata(),
    "metadata": [client.get_model_metadata("pets"), client.get_model_metadata("pets.small", "1")],
    "config": [client.get_model_config("pets"), client.get_model_config("pets.big")],
    "index": client.get_model_repository_index(),
    "y": result.as_numpy("y").tolist(),
    "asynchronous": client.async_infer("pets", [tensor]).get_result().as_numpy("y").tolist(),
    "statistics": [client.get_inference_statistics(), client.get_inference_statistics("pets")],
}))
"""


async def test_tritonclient_sync_works_unmodified(server: Server) -> None:
    x = rows(5)
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error::SyntaxWarning", "-c", SYNC_CLIENT, f"127.0.0.1:{server.port}", json.dumps(x.tolist())),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await asyncio.wait_for(child.communicate(), DEADLINE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    assert child.returncode == 0
    said = json.loads(output)
    assert said["live"] == [True, True, True]
    assert said["server"]["name"] == "ensemble-operator"
    np.testing.assert_allclose(said["y"], combined(x), rtol=1e-4, atol=1e-6)
    assert said["asynchronous"] == said["y"]
    tensors = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, FEATURES]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, CLASSES]}],
    }
    assert said["metadata"] == [
        {"name": "pets", "versions": ["1"], "platform": "ensemble", **tensors},
        {"name": "pets.small", "versions": ["1"], "platform": "onnxruntime_onnx", **tensors},
    ]
    ensemble, member = said["config"]
    assert [step["model_name"] for step in ensemble["ensemble_scheduling"]["step"]] == ["pets.small", "pets.big"]
    assert ensemble["platform"] == "ensemble"
    assert (member["backend"], member["max_batch_size"]) == ("pytorch", MAX_ROWS)
    assert member["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [FEATURES]}]
    assert [entry["state"] for entry in said["index"]] == ["READY"] * 3
    every, of_ensemble = said["statistics"]
    assert [entry["name"] for entry in every["model_stats"]] == ["pets", "pets.small", "pets.big"]
    assert of_ensemble["model_stats"][0]["inference_count"] == 10
    assert every["model_stats"][2]["inference_stats"]["success"]["count"] == 2


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/models/cats", 404, "model 'cats' is not served here: ask for pets, pets.small, pets.big"),
        ("GET", "/v2/models/pets/versions/2/config", 404, "version '2' of model 'pets' is not served here"),
        ("GET", "/nowhere", 404, "no such path '/nowhere'"),
        ("GET", "/v2/models/pets/infer", 405, "GET is not for '/v2/models/pets/infer': use POST"),
        ("POST", "/v2/health/live", 405, "use GET, HEAD"),
        ("POST", "/v2/models/pets/infer", 400, "the body is empty"),
    ],
)
async def test_errors_are_v2_errors(
    server: Server, session: aiohttp.ClientSession, method: str, path: str, status: int, message: str
) -> None:
    async with session.request(method, server.url + path) as response:
        assert response.status == status
        assert response.content_type == "application/json"
        assert message in json.loads(await response.read())["error"]


async def test_not_ready_says_so(server: Server, session: aiohttp.ClientSession) -> None:
    async def status(path: str) -> int:
        async with session.get(server.url + path) as response:
            return response.status

    server.pipeline.live[1] = False
    assert await status("/v2/models/pets/ready") == 503
    assert await status("/v2/models/pets.big/ready") == 503
    assert await status("/v2/models/pets.small/ready") == 200
    assert await status("/v2/health/ready") == 200
    async with session.post(server.url + "/v2/repository/index", json={"ready": True}) as response:
        assert [entry["name"] for entry in json.loads(await response.read())] == ["pets.small"]
    async with session.post(server.url + "/v2/repository/index", data=b"[") as response:
        assert response.status == 400
    async with session.post(server.url + "/v2/models/pets/infer", json=json_request(rows(1))) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
    server.pipeline.ready = False
    assert await status("/v2/health/ready") == 503
    assert await status("/v2/health/live") == 200


async def test_metrics_are_prometheus_text(server: Server, session: aiohttp.ClientSession) -> None:
    server.pipeline.metrics.failed(ENSEMBLE, Failure.CANCELED)
    async with session.get(server.url + "/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = (await response.read()).decode()
    assert 'nv_inference_request_failure{model="pets",version="1",reason="CANCELED"} 1' in text
    assert len(list(text_string_to_metric_families(text))) > 10


async def test_a_body_in_chunks_and_curls_content_type(server: Server, session: aiohttp.ClientSession) -> None:
    x = rows(7)
    text = json.dumps(json_request(x)).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(text), 100):
            yield text[start : start + 100]

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    async with session.post(server.url + "/v2/models/pets/infer", data=chunks(), headers=headers) as response:
        answer = json.loads(await response.read())
    assert response.status == 200
    np.testing.assert_allclose(
        np.reshape(answer["outputs"][0]["data"], (7, CLASSES)), combined(x), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_large_answers_are_compressed(server: Server, session: aiohttp.ClientSession, encoding: str) -> None:
    x = rows(MAX_ROWS)
    parameters = {"binary_data_size": x.nbytes}
    text = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": parameters}]})
    headers = {
        "Accept-Encoding": encoding,
        "Content-Encoding": "gzip",
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(text)),
    }
    body = gzip.compress(text.encode() + x.tobytes())
    async with session.post(server.url + "/v2/models/pets/infer", data=body, headers=headers) as response:
        assert response.headers["Content-Encoding"] == encoding
        packed = await response.read()
    plain = gzip.decompress(packed) if encoding == "gzip" else zlib.decompress(packed)
    assert len(plain) > OFF_LOOP_BYTES
    data = json.loads(plain)["outputs"][0]["data"]
    np.testing.assert_allclose(np.reshape(data, (MAX_ROWS, CLASSES)), combined(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        ({"Content-Type": "image/png"}, b"{}", 415, "Content-Type 'image/png' is not served"),
        ({"Content-Encoding": "zstd"}, b"{}", 415, "Content-Encoding 'zstd' is not served"),
        ({"Content-Encoding": "gzip"}, b"not gzip", 400, "not gzip"),
        ({"Content-Encoding": "gzip"}, gzip.compress(bytes(10_000_000)), 413, "over the limit of 200000 bytes"),
        ({}, bytes(MAX_BODY_BYTES + 1), 413, "a body of 200001 bytes is over the limit of 200000 bytes"),
        ({"Inference-Header-Content-Length": "99"}, b"{}", 400, "not within the body"),
        ({}, TOO_MANY_ROWS, 413, "4097 rows are over the limit of 4096"),
    ],
)
async def test_bad_bodies_are_refused_and_the_next_request_works(  # type: ignore[no-untyped-def]
    server: Server, session: aiohttp.ClientSession, headers, body, status, message
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    async with session.post(server.url + "/v2/models/pets/infer", data=body, headers=headers) as response:
        assert message in json.loads(await response.read())["error"]
        assert response.status == status
    async with session.post(server.url + "/v2/models/pets/infer", json=json_request(rows(1))) as response:
        assert response.status == 200


async def test_chunks_over_the_limit_are_refused_while_they_come(server: Server) -> None:
    reader, writer = await raw(server, "POST /v2/models/pets/infer HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n")
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(8):
            writer.write(chunk)
            await writer.drain()
    assert b" 413 " in await asyncio.wait_for(reader.readline(), DEADLINE_S)
    writer.close()


async def test_expect_continue(server: Server) -> None:
    body = json.dumps(json_request(rows(2))).encode()
    head = "POST /v2/models/{}/infer HTTP/1.1\nHost: x\nExpect: {}\nContent-Length: {}\nConnection: close\n"
    reader, writer = await raw(server, head.format("pets", "100-continue", len(body)))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert b" 200 " in await asyncio.wait_for(reader.readline(), DEADLINE_S)
    writer.close()
    for model, expect, size, status in (
        ("pets", "100-continue", MAX_BODY_BYTES + 1, b" 413 "),
        ("cats", "100-continue", 10, b" 404 "),
        ("pets", "a miracle", 10, b" 417 "),
    ):
        reader, writer = await raw(server, head.format(model, expect, size))
        answer = await asyncio.wait_for(reader.read(1000), DEADLINE_S)
        assert status in answer.partition(b"\r\n")[0]
        assert b'{"error":' in answer
        writer.close()


async def test_a_client_that_sends_no_body_is_told_so(server: Server) -> None:
    reader, writer = await raw(server, "POST /v2/models/pets/infer HTTP/1.1\nHost: x\nContent-Length: 10\n", b"{")
    answer = await asyncio.wait_for(reader.read(1000), DEADLINE_S)
    assert b" 408 " in answer.partition(b"\r\n")[0]
    assert b"the body did not arrive within 1 s" in answer
    writer.close()


async def test_a_client_that_leaves_cancels_its_request(server: Server) -> None:
    server.pipeline.late = True
    body = json.dumps(json_request(rows(1))).encode()
    _, writer = await raw(server, f"POST /v2/models/pets/infer HTTP/1.1\nHost: x\nContent-Length: {len(body)}\n", body)
    await asyncio.wait_for(server.pipeline.arrived.wait(), DEADLINE_S)
    assert not server.pipeline.left.is_set()
    writer.close()
    await asyncio.wait_for(server.pipeline.left.wait(), DEADLINE_S)


async def test_an_internal_error_is_logged_and_tells_no_secrets(
    server: Server, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    server.pipeline.models = None  # type: ignore[assignment]
    async with session.get(server.url + "/v2/models/pets") as response:
        assert response.status == 500
        assert json.loads(await response.read()) == {"error": "internal error: the gateway's log has the cause"}
    assert "GET /v2/models/pets failed" in caplog.text
