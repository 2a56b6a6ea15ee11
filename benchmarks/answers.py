"""Requests as bytes made beforehand, and answers cut out of a byte stream: HTTP/1.1 and V2 as far as a load needs them.

Pure: no socket, no clock. A V2 answer is trusted only after its JSON header was read; a header seen before, byte for
byte, is recognised by a look-up.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from benchmarks.workloads import Workload

MAX_KNOWN_HEADS = 256
MAX_HEAD_BYTES = 65_536
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+) *\r\n", re.IGNORECASE)
_JSON_LENGTH = re.compile(rb"\r\ninference-header-content-length: *(\d+) *\r\n", re.IGNORECASE)


class BadAnswer(Exception):
    """An answer that is not what was asked for: an error status, another output, a partial ensemble.

    `broken` says that the connection's further bytes cannot be understood either.
    """

    def __init__(self, message: str, *, broken: bool = False) -> None:
        super().__init__(message)
        self.broken = broken


class Target(msgspec.Struct, frozen=True):
    """A server and how it wants its tensors: `v2` (binary tensor extension) or `raw` (the bytes alone, both ways)."""

    name: str
    port: int
    path: str
    form: str = "v2"
    host: str = "127.0.0.1"


def v2_target(name: str, port: int, model: str) -> Target:
    """A model behind the Open Inference Protocol V2."""
    return Target(name, port, f"/v2/models/{model}/infer")


def request_head(target: Target, workload: Workload, rows: int) -> bytes:
    """Everything of a request but its tensor."""
    body_bytes = rows * workload.input.row_bytes
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/octet-stream",
    ]
    text = b""
    if target.form == "v2":
        tensor = {
            "name": workload.input.name,
            "datatype": workload.input.datatype,
            "shape": [rows, *workload.input.shape],
            "parameters": {"binary_data_size": body_bytes},
        }
        wish = {"name": workload.output.name, "parameters": {"binary_data": True}}
        text = json.dumps({"inputs": [tensor], "outputs": [wish]}, separators=(",", ":")).encode()
        lines.append(f"Inference-Header-Content-Length: {len(text)}")
    lines.append(f"Content-Length: {len(text) + body_bytes}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + text


class AnswerStream:
    """Cuts the answers out of one connection's bytes; one answer at a time, as each request waits for the one before.

    `known` is shared by the connections of a window: answer heads (status, headers, JSON) to the length of the whole
    answer.
    """

    __slots__ = ("_known", "_output_bytes", "_pending", "_prefix_length", "_rows", "_target", "_total", "_workload")

    def __init__(self, target: Target, workload: Workload, rows: int, known: dict[bytes, int]) -> None:
        self._target = target
        self._workload = workload
        self._rows = rows
        self._output_bytes = rows * workload.output.row_bytes
        self._known = known
        self._prefix_length = 0
        self._pending = bytearray()
        self._total = 0

    def feed(self, chunk: bytes) -> bytes | None:
        """The output tensor's bytes when `chunk` completes an answer, else None.

        Raises BadAnswer if the answer is not the tensor that was asked for.
        """
        if not self._pending and self._known.get(chunk[: self._prefix_length]) == len(chunk):
            return chunk[self._prefix_length :]
        self._pending += chunk
        if not self._total:
            self._measure()
        if not self._total or len(self._pending) < self._total:
            return None
        answer = bytes(self._pending[: self._total])
        surplus = len(self._pending) > self._total
        self._pending.clear()
        self._total = 0
        if surplus:
            raise BadAnswer(f"{self._target.name}: more bytes than the answer has", broken=True)
        return self._checked(answer)

    def _measure(self) -> None:
        end = self._pending.find(b"\r\n\r\n")
        if end < 0:
            if len(self._pending) > MAX_HEAD_BYTES:
                raise BadAnswer(f"{self._target.name}: no end of the headers in {MAX_HEAD_BYTES} bytes", broken=True)
            return
        length = _LENGTH.search(self._pending, 0, end + 2)
        if length is None:
            raise BadAnswer(f"{self._target.name}: an answer without Content-Length", broken=True)
        self._total = end + 4 + int(length[1])

    def _checked(self, answer: bytes) -> bytes:
        body = answer.index(b"\r\n\r\n") + 4
        if not answer.startswith(b"HTTP/1.1 200"):
            status = answer[:80].splitlines()[0].decode(errors="replace")
            raise BadAnswer(f"{self._target.name}: {status} {answer[body : body + 300]!r}")
        json_length = _JSON_LENGTH.search(answer, 0, body - 2)
        start = body + (int(json_length[1]) if json_length else 0)
        if self._target.form == "v2":
            self._check_header(answer[body:start])
        if len(answer) - start != self._output_bytes:
            raise BadAnswer(f"{self._target.name}: {len(answer) - start} bytes of output, not {self._output_bytes}")
        if len(self._known) >= MAX_KNOWN_HEADS:
            self._known.clear()
        self._known[answer[:start]] = len(answer)
        self._prefix_length = start
        return answer[start:]

    def _check_header(self, text: bytes) -> None:
        try:
            header: dict[str, Any] = json.loads(text)
            outputs = [
                (o["name"], o["datatype"], o["shape"], o["parameters"]["binary_data_size"]) for o in header["outputs"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise BadAnswer(f"{self._target.name}: not a V2 header with binary outputs: {text[:300]!r}") from error
        output = self._workload.output
        wanted = [(output.name, output.datatype, [self._rows, *output.shape], self._output_bytes)]
        if outputs != wanted:
            raise BadAnswer(f"{self._target.name}: outputs {outputs}, not {wanted}")
        if header.get("parameters", {}).get("members_missing"):
            raise BadAnswer(f"{self._target.name}: members are missing: {header['parameters']}")
