"""A client of the public port that speaks HTTP by the byte, and the requests that tests send with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 8
ANSWER_S = 60.0


@dataclass(frozen=True)
class Reply:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """V2's error message."""
        assert self.headers["content-type"].startswith("application/json"), self
        found: str = json.loads(self.body)["error"]
        return found

    def y(self, name: str = "y") -> Array:
        """An output, binary or JSON."""
        assert self.status == 200, self
        length = self.headers.get("inference-header-content-length")
        text, binary = (self.body[: int(length)], self.body[int(length) :]) if length else (self.body, b"")
        at = 0
        for output in json.loads(text)["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size", 0)
            if output["name"] == name:
                flat = np.frombuffer(binary[at : at + size], "<f4") if size else np.array(output["data"], np.float32)
                return flat.reshape(output["shape"])
            at += size
        raise AssertionError(f"no output {name}")


class Client:
    """A connection to the public port that speaks HTTP by the byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def send(self, request: bytes) -> None:
        self.writer.write(request)

    def close(self) -> None:
        self.writer.close()

    async def reply(self, within_s: float = ANSWER_S, *, bodiless: bool = False) -> Reply:
        """The next answer."""
        async with asyncio.timeout(within_s):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().rstrip("\r\n").split("\r\n")
            headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            size = 0 if bodiless else int(headers.get("content-length", 0))
            return Reply(int(first.split()[1]), headers, await self.reader.readexactly(size))

    async def ask(self, request: bytes, within_s: float = ANSWER_S) -> Reply:
        self.send(request)
        return await self.reply(within_s)

    async def ended(self, within_s: float = ANSWER_S) -> bool:
        """Whether the server closes the connection without another byte."""
        async with asyncio.timeout(within_s):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


def post(body: bytes, *, target: str = "/v2/models/echo/infer", **headers: object) -> bytes:
    """A POST; headers by name with underscores for dashes, None to leave one out."""
    fields = {"Host": "x", "Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


def infer(x: Array, *, parameters: Mapping[str, Any] | None = None, model: str = "echo", **headers: object) -> bytes:
    """An inference in binary, in and out."""
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "parameters": {"binary_data_size": x.nbytes}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **(parameters or {})}}).encode()
    target = f"/v2/models/{model}/infer"
    return post(text + x.tobytes(), target=target, Inference_Header_Content_Length=len(text), **headers)


def infer_json(x: Array, **more: Any) -> bytes:
    """The JSON body of an inference."""
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def get(target: str, method: str = "GET", **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
