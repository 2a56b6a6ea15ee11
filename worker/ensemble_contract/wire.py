"""The wire between gateway and worker: one type a message, the same bytes over ZeroMQ and in shared memory.

`protocol.md` beside this file is the document: frame by frame, with what each peer must do. Every decoder is total: it
returns a message or raises ProtocolError, and allocates no more than a small multiple of what it was given.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Sequence
from enum import IntEnum
from operator import add
from typing import Any, NamedTuple, TypeVar

import msgspec

from ensemble_contract.errors import ProtocolError

PROTOCOL_VERSION = 1
MAGIC = 0x4F45  # "EO", little-endian
MAX_CONTROL_BYTES = 1 << 20
MAX_TEXT_BYTES = 4096
# The longest frame without a tensor: a PUT of as many ranges as a batch may have, or a control message.
MAX_FRAME_BYTES = 2 << 20
MAX_ROWS = 1 << 24
# An ensemble has no more members.
MAX_INSTANCES = 64
MAX_BATCH_ROWS = 65_536
MAX_SLOTS = (1 << 32) - 1
MAX_SHARED_BYTES = 1 << 48
MIN_RING_BYTES = 128 + 1024
MAX_RING_BYTES = 1 << 30
MAX_CREDITS = 1024
RESULT_ALIGNMENT = 64

# C leaves the size of these to the platform; the wire does not.
_U32 = next(code for code in "IL" if array(code).itemsize == 4)

Ranges = Sequence[tuple[int, int]]


class RowRanges(NamedTuple):
    """Decoded ranges: where each starts and how many rows it has, and the rows of them all."""

    starts: array[int]
    counts: array[int]
    rows: int


_HEAD = struct.Struct("<HBBI")
_RUN = struct.Struct("<HBBIQIIQ")
_PUT = struct.Struct("<HBBIII")
_RESULT = struct.Struct("<HBBIQQ")
_FAILED = struct.Struct("<HBBIQ")
_PAIR = struct.Struct("<II")
_IDS = [struct.Struct(f"<{many}I") for many in range(MAX_INSTANCES + 1)]
_TIMES = [struct.Struct(f"<{many}Q") for many in range(MAX_INSTANCES + 1)]


class MessageType(IntEnum):
    """The fourth byte of every message."""

    HELLO = 1
    STATE = 2
    PING = 3
    BYE = 4
    PUT = 5
    RUN = 6
    RESULT = 7
    FAILED = 8


class FailureCode(IntEnum):
    """Why a worker could not answer a batch."""

    MODEL_ERROR = 1
    UNKNOWN_INSTANCE = 2
    OUT_OF_MEMORY = 3
    DEVICE_LOST = 4
    BAD_REQUEST = 5


class Hello(msgspec.Struct, frozen=True, rename="camel"):
    """A gateway introduces itself. `shared` tells a worker on the same machine how the passed memory is laid out."""

    gateway: str
    protocol: int = PROTOCOL_VERSION
    shared: SharedLayout | None = None


class SharedLayout(msgspec.Struct, frozen=True, rename="camel"):
    """Sizes in bytes of what the descriptors beside a Hello hold: the row store, and this link's rings and results."""

    store_bytes: int
    slots: int
    ring_bytes: int
    arena_bytes: int

    def __post_init__(self) -> None:
        """Refuse sizes that nobody could map. Raises ValueError naming the field."""
        _within("slots", self.slots, 1, MAX_SLOTS)
        _within("storeBytes", self.store_bytes, 1, MAX_SHARED_BYTES)
        _within("ringBytes", self.ring_bytes, MIN_RING_BYTES, MAX_RING_BYTES)
        _within("arenaBytes", self.arena_bytes, 1, MAX_SHARED_BYTES)


class LiveInstance(msgspec.Struct, frozen=True, rename="camel"):
    """An instance that answers now. `id` is unique in the worker's life; `latency_s` is that of one full batch."""

    id: int
    member: str
    digest: str
    batch_size: int
    latency_s: float

    def __post_init__(self) -> None:
        """Refuse what nobody could plan with. Raises ValueError naming the field."""
        _within("id", self.id, 0, 0xFFFF_FFFF)
        _within("batchSize", self.batch_size, 1, MAX_BATCH_ROWS)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"latencyS of {self.latency_s} is not a duration")


class State(msgspec.Struct, frozen=True, rename="camel"):
    """What a worker can do for this gateway, sent after Hello and on every change.

    `serial`: one batch at a time (a CPU device), so that `credits` count batches of the whole worker; otherwise they
    count batches of each instance. `cache_rows`: rows that this gateway may keep here (0: rows are read where they
    lie); it stays the same for the whole connection. `put_with_run`: a Put's message may end with the Run that needs
    its rows.
    """

    worker: str
    generation: int
    instances: tuple[LiveInstance, ...]
    serial: bool
    credits: int
    cache_rows: int = 0
    device_class: str = ""
    put_with_run: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself. Raises ValueError naming the field."""
        _within("generation", self.generation, 0, (1 << 63) - 1)
        _within("credits", self.credits, 1, MAX_CREDITS)
        _within("cacheRows", self.cache_rows, 0, MAX_SLOTS)
        if len({instance.id for instance in self.instances}) != len(self.instances):
            raise ValueError("instances: an id is listed twice")


class Ping(msgspec.Struct, frozen=True):
    """A sign of life, every second in both directions."""


class Bye(msgspec.Struct, frozen=True):
    """The peer leaves and expects nothing more."""


class Put(msgspec.Struct, frozen=True):
    """Rows for ranges of slots in the worker's cache; the tensors follow, or lie in ranges `source` of the store."""

    cache: RowRanges
    source: RowRanges


class Run(msgspec.Struct, frozen=True):
    """Run one batch: the rows in these ranges (of the cache, or of the store), through each of these instances.

    `result_offset`, a multiple of 64, is where in the results' shared memory the outputs go, one after the other, each
    64-byte aligned; an output is of shape (instances, rows, *shape).
    """

    batch: int
    instances: tuple[int, ...]
    rows: int
    result_offset: int
    ranges: RowRanges


class Result(msgspec.Struct, frozen=True):
    """A batch is done; its outputs follow as frames, or lie at the Run's `result_offset`.

    `compute_ns` has the time of each instance, in the Run's order.
    """

    batch: int
    queue_ns: int
    compute_ns: tuple[int, ...]


class Failed(msgspec.Struct, frozen=True):
    """A batch could not be run."""

    batch: int
    code: FailureCode
    text: str


Message = Hello | State | Ping | Bye | Put | Run | Result | Failed

PING = _HEAD.pack(MAGIC, PROTOCOL_VERSION, MessageType.PING, 0)
BYE = _HEAD.pack(MAGIC, PROTOCOL_VERSION, MessageType.BYE, 0)


def encode_control(message: Hello | State) -> bytes:
    """The bytes of a Hello or State: a head and JSON.

    Raises ProtocolError over 1 MiB.
    """
    kind = MessageType.HELLO if isinstance(message, Hello) else MessageType.STATE
    text = msgspec.json.encode(message)
    if len(text) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"{kind.name} of {len(text)} bytes is over the limit of {MAX_CONTROL_BYTES}")
    return _HEAD.pack(MAGIC, PROTOCOL_VERSION, kind, len(text)) + text


def encode_run(batch: int, instances: Sequence[int], rows: int, result_offset: int, ranges: Ranges) -> bytes:
    """The bytes of a Run."""
    many = len(instances)
    head = _RUN.pack(MAGIC, PROTOCOL_VERSION, MessageType.RUN, len(ranges), batch, many, rows, result_offset)
    head += _IDS[many].pack(*instances)
    if len(ranges) == 1:
        return head + _PAIR.pack(*ranges[0])
    return head + _pairs(ranges)


def encode_put(cache: Ranges, source: Ranges = ()) -> bytes:
    """The bytes of a Put's head; tensors follow as frames unless `source` says where they lie."""
    head = _PUT.pack(MAGIC, PROTOCOL_VERSION, MessageType.PUT, 0, len(cache), len(source))
    return head + _pairs(cache) + _pairs(source)


def encode_result(batch: int, queue_ns: int, compute_ns: Sequence[int]) -> bytes:
    """The bytes of a Result's head."""
    many = len(compute_ns)
    head = _RESULT.pack(MAGIC, PROTOCOL_VERSION, MessageType.RESULT, many, batch, queue_ns)
    return head + _TIMES[many].pack(*compute_ns)


def encode_failed(batch: int, code: FailureCode, text: str) -> bytes:
    """The bytes of a Failed; the text is cut at 4 kB."""
    cut = text.encode(errors="replace")[:MAX_TEXT_BYTES]
    return _FAILED.pack(MAGIC, PROTOCOL_VERSION, MessageType.FAILED, code, batch) + cut


def decode(head: bytes | memoryview) -> Message:
    """The message in a head frame or ring record.

    Raises ProtocolError for anything that `protocol.md` does not allow.
    """
    if len(head) < _HEAD.size:
        raise ProtocolError(f"a message of {len(head)} bytes has no head")
    magic, version, kind, number = _HEAD.unpack_from(head)
    if magic != MAGIC:
        raise ProtocolError(f"magic is {magic:#06x}, not {MAGIC:#06x}: the peer is not one of ours")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version} is not {PROTOCOL_VERSION}: upgrade the older peer")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"message type {kind} is unknown")
    message: Message = decoder(head, number)
    return message


def _decode_run(head: bytes | memoryview, count: int) -> Run:
    if len(head) < _RUN.size:
        raise ProtocolError(f"RUN of {len(head)} bytes is too short")
    _, _, _, _, batch, many, rows, result_offset = _RUN.unpack_from(head)
    if not 1 <= many <= MAX_INSTANCES or len(head) != _RUN.size + 4 * many + 8 * count:
        raise ProtocolError(f"RUN of {len(head)} bytes does not hold {many} instances and {count} ranges")
    instances = _IDS[many].unpack_from(head, _RUN.size)
    ranges = _ranges(head, _RUN.size + 4 * many, count)
    if not 1 <= rows <= MAX_ROWS or ranges.rows != rows:
        raise ProtocolError(f"RUN of {rows} rows: its ranges do not add up")
    if result_offset % RESULT_ALIGNMENT:
        raise ProtocolError(f"RUN with results at {result_offset}, which is not a multiple of {RESULT_ALIGNMENT}")
    return Run(batch, instances, rows, result_offset, ranges)


def _decode_put(head: bytes | memoryview, _number: int) -> Put:
    if len(head) < _PUT.size:
        raise ProtocolError(f"PUT of {len(head)} bytes is too short")
    cached, sourced = _PUT.unpack_from(head)[4:]
    if len(head) != _PUT.size + 8 * (cached + sourced):
        raise ProtocolError(f"PUT of {len(head)} bytes does not hold {cached} and {sourced} ranges")
    cache = _ranges(head, _PUT.size, cached)
    source = _ranges(head, _PUT.size + 8 * cached, sourced)
    if not 1 <= cache.rows <= MAX_ROWS or (sourced and source.rows != cache.rows):
        raise ProtocolError(f"PUT of {cache.rows} rows: its ranges do not add up")
    return Put(cache, source)


def _decode_result(head: bytes | memoryview, many: int) -> Result:
    if not 1 <= many <= MAX_INSTANCES or len(head) != _RESULT.size + 8 * many:
        raise ProtocolError(f"RESULT of {len(head)} bytes does not hold the times of {many} instances")
    batch, queue_ns = _RESULT.unpack_from(head)[4:]
    return Result(batch, queue_ns, _TIMES[many].unpack_from(head, _RESULT.size))


def _decode_failed(head: bytes | memoryview, code: int) -> Failed:
    if not _FAILED.size <= len(head) <= _FAILED.size + MAX_TEXT_BYTES:
        raise ProtocolError(f"FAILED has {len(head)} bytes")
    if code not in FailureCode.__members__.values():
        raise ProtocolError(f"failure code {code} is unknown")
    text = bytes(head[_FAILED.size :]).decode(errors="replace")
    return Failed(_FAILED.unpack_from(head)[4], FailureCode(code), text)


ControlT = TypeVar("ControlT", Hello, State)


def _decode_control(head: bytes | memoryview, length: int, form: type[ControlT]) -> ControlT:
    if length > MAX_CONTROL_BYTES or len(head) != _HEAD.size + length:
        raise ProtocolError(f"{form.__name__.upper()} of {len(head)} bytes does not hold {length} bytes of JSON")
    try:
        return msgspec.json.decode(head[_HEAD.size :], type=form)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"{form.__name__.upper()}: {error}") from error


def _empty(head: bytes | memoryview, form: type[Ping] | type[Bye]) -> Ping | Bye:
    if len(head) != _HEAD.size:
        raise ProtocolError(f"{form.__name__.upper()} has {len(head)} bytes, not {_HEAD.size}")
    return form()


def _ranges(head: bytes | memoryview, offset: int, count: int) -> RowRanges:
    """`count` pairs of start and length; every range has rows and lies inside 32 bits."""
    numbers = array(_U32)
    numbers.frombytes(head[offset : offset + 8 * count])
    if sys.byteorder == "big":
        numbers.byteswap()
    starts, counts = numbers[::2], numbers[1::2]
    if count and (min(counts) == 0 or max(map(add, starts, counts)) > 0xFFFF_FFFF):
        raise ProtocolError("a range is empty or ends beyond 32 bits")
    return RowRanges(starts, counts, sum(counts))


def _pairs(ranges: Ranges) -> bytes:
    numbers = array(_U32, [number for pair in ranges for number in pair])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _within(field: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise ValueError(f"{field} of {number} is not in {low}..{high}")


_DECODERS: dict[int, Any] = {
    MessageType.HELLO: lambda head, number: _decode_control(head, number, Hello),
    MessageType.STATE: lambda head, number: _decode_control(head, number, State),
    MessageType.PING: lambda head, _: _empty(head, Ping),
    MessageType.BYE: lambda head, _: _empty(head, Bye),
    MessageType.PUT: _decode_put,
    MessageType.RUN: _decode_run,
    MessageType.RESULT: _decode_result,
    MessageType.FAILED: _decode_failed,
}
