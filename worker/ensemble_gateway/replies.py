"""Replies as bytes: HTTP head, V2 JSON and tensors, ready for one write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from ensemble_gateway.request import Answer, Array, InferHeader, RequestError
from ensemble_gateway.v2 import answer_prefix, binary_sizes, encode_answer, error_body

CACHED_PREFIXES = 4096
CACHED_PREFIX_BYTES = 4096

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus} | {499: b"Client Closed Request"}


@dataclass(frozen=True, slots=True)
class Prefix:
    """Everything of an answer but its tensors, which follow in the order of `outputs` (positions in the model's)."""

    text: bytes
    outputs: tuple[int, ...]

    def join_with(self, outputs: Sequence[Array]) -> bytes:
        """The whole reply; `outputs` are the model's."""
        if len(self.outputs) == 1:
            return self.text + outputs[self.outputs[0]].tobytes()
        return b"".join((self.text, *(outputs[position].tobytes() for position in self.outputs)))


class Replies:
    """Prefixes of answers by the request's header: one from the edge's cache is the same object each time."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[int, bool], tuple[InferHeader, Prefix]] = {}

    def prefix(self, header: InferHeader, keep_alive: bool) -> Prefix | None:
        """The prefix of the usual answer; None where the answer has to be made each time."""
        # By identity: hashing a header would cost more than all the rest. The entry keeps the object alive, so that
        # its id stays its own.
        key = (id(header), keep_alive)
        known = self._prefixes.get(key)
        if known is not None:
            return known[1]
        prefix = _prefix(header, keep_alive)
        if prefix is not None and len(prefix.text) <= CACHED_PREFIX_BYTES and _comes_again(header):
            if len(self._prefixes) >= CACHED_PREFIXES:
                self._prefixes.clear()
            self._prefixes[key] = (header, prefix)
        return prefix

    def clear(self) -> None:
        """Forget all."""
        self._prefixes.clear()


def full_reply(header: InferHeader, answer: Answer, keep_alive: bool) -> bytes:
    """The reply with any answer.

    Raises RequestError (400) where JSON cannot express an output.
    """
    encoded = encode_answer(header, answer)
    size = len(encoded.json) + sum(len(part) for part in encoded.binary)
    return b"".join((_ok(size, encoded.header_length, keep_alive), encoded.json, *encoded.binary))


def error_reply(error: RequestError, keep_alive: bool) -> bytes:
    """The reply with an error."""
    body = error_body(str(error))
    retry = b"Retry-After: %d\r\n" % error.retry_after_s if error.retry_after_s else b""
    return b"HTTP/1.1 %d %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s" % (
        error.status, _PHRASES.get(error.status, b"Error"), retry, len(body), _connection(keep_alive), body,
    )  # fmt: skip


def _prefix(header: InferHeader, keep_alive: bool) -> Prefix | None:
    text = answer_prefix(header, header.rows, True)
    if text is None:
        return None
    sizes = binary_sizes(header, header.rows)
    positions = {spec.name: position for position, spec in enumerate(header.model.outputs)}
    head = _ok(len(text) + sum(sizes.values()), len(text), keep_alive)
    return Prefix(head + text, tuple(positions[name] for name in sizes))


def _comes_again(header: InferHeader) -> bool:
    """Whether the header may be one of the edge's cache: those whose inputs came as JSON never are."""
    return bool(header.inputs) and all(part.array is None for part in header.inputs)


def _ok(size: int, header_length: int | None, keep_alive: bool) -> bytes:
    if header_length is None:
        kind = b"Content-Type: application/json\r\n"
    else:
        kind = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n" % header_length
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n%s\r\n" % (kind, size, _connection(keep_alive))


def _connection(keep_alive: bool) -> bytes:
    return b"" if keep_alive else b"Connection: close\r\n"
