"""Hostile frames: the decoder knows ProtocolError and nothing else, quickly and in little memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError

HEAD = struct.Struct("<HBBI")
RUN = struct.Struct("<HBBIQIIQ")
PUT = struct.Struct("<HBBIII")

SEEDS = [
    wire.encode_control(wire.Hello("gw", shared=wire.SharedLayout(8192, 64, 4224, 65536))),
    wire.encode_control(wire.State("w", 1, (wire.LiveInstance(1, "m", "d", 8, 0.5),), True, 2, 64, "cpu")),
    wire.PING,
    wire.BYE,
    wire.encode_put([(0, 2), (5, 1)], [(7, 3)]),
    wire.encode_run(1, [1, 4], 5, 64, [(0, 2), (9, 3)]),
    wire.encode_result(1, 2, [3]),
    wire.encode_failed(1, wire.FailureCode.MODEL_ERROR, "no"),
]


def control(kind: int, text: bytes) -> bytes:
    return HEAD.pack(wire.MAGIC, wire.PROTOCOL_VERSION, kind, len(text)) + text


def state(**more: str) -> bytes:
    fields = {"worker": '"w"', "generation": "1", "instances": "[]", "serial": "true", "credits": "1", **more}
    return control(2, ("{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}").encode())


def live(**more: str) -> str:
    fields = {"id": "1", "member": '"m"', "digest": '"d"', "batchSize": "1", "latencyS": "1", **more}
    return "{" + ",".join(f'"{key}":{value}' for key, value in fields.items()) + "}"


def shared(**more: int) -> bytes:
    fields = {"storeBytes": 8192, "slots": 64, "ringBytes": 4224, "arenaBytes": 65536, **more}
    layout = ",".join(f'"{key}":{value}' for key, value in fields.items())
    return control(1, f'{{"gateway":"g","shared":{{{layout}}}}}'.encode())


def run(
    rows: int, ranges: list[tuple[int, int]], *, count: int | None = None, at: int = 0, many: int = 1,
    said: int | None = None,
) -> bytes:  # fmt: skip
    """A RUN of `many` instances and these ranges, which claims `said` instances and `count` ranges."""
    ranged = len(ranges) if count is None else count
    head = RUN.pack(wire.MAGIC, 1, 6, ranged, 1, many if said is None else said, rows, at)
    return head + struct.pack(f"<{many}I", *range(many)) + b"".join(struct.pack("<II", *pair) for pair in ranges)


def result(many: int, said: int) -> bytes:
    """A RESULT with the times of `many` instances, which claims `said`."""
    return HEAD.pack(wire.MAGIC, 1, 7, said) + bytes(16 + 8 * many)


def put(cached: int, sourced: int, *ranges: tuple[int, int]) -> bytes:
    head = PUT.pack(wire.MAGIC, 1, 5, 0, cached, sourced)
    return head + b"".join(struct.pack("<II", *pair) for pair in ranges)


BAD = {
    "empty": (b"", "no head"),
    "half a head": (wire.PING[:7], "no head"),
    "magic": (b"HTTP/1.1", "magic"),
    "magic, swapped": (b"OE" + wire.PING[2:], "magic"),
    "version": (wire.PING[:2] + b"\x02" + wire.PING[3:], "upgrade the older peer"),
    "type 0": (HEAD.pack(wire.MAGIC, 1, 0, 0), "type 0 is unknown"),
    "type 255": (HEAD.pack(wire.MAGIC, 1, 255, 0), "type 255 is unknown"),
    "long ping": (wire.PING + b"\0", "PING has 9 bytes"),
    "long bye": (wire.BYE + b"\0", "BYE has 9 bytes"),
    "hello cut off": (SEEDS[0][:-1], "HELLO of"),
    "hello too long": (SEEDS[0] + b" ", "HELLO of"),
    "hello of 4 GiB": (HEAD.pack(wire.MAGIC, 1, 1, 0xFFFF_FFFF), "HELLO of 8 bytes"),
    "hello that is a list": (control(1, b"[]"), "Expected `object`"),
    "hello without a name": (control(1, b"{}"), "gateway"),
    "hello that is no UTF-8": (control(1, b'{"gateway":"\xff"}'), "HELLO"),
    "hello nested": (control(1, b"[" * 100_000), "HELLO"),
    "hello nested where it is skipped": (control(1, b'{"x":' * 50_000), "HELLO"),
    "negative slots": (shared(slots=-1), "slots of -1"),
    "no slots": (shared(slots=0), "slots of 0"),
    "store of 2^63": (shared(storeBytes=1 << 62), "storeBytes"),
    "tiny ring": (shared(ringBytes=8), "ringBytes"),
    "huge ring": (shared(ringBytes=1 << 40), "ringBytes"),
    "no arena": (shared(arenaBytes=0), "arenaBytes"),
    "state without credits": (state(credits="0"), "credits of 0"),
    "state with endless credits": (state(credits="1000000000"), "credits"),
    "negative cache": (state(cacheRows="-1"), "cacheRows of -1"),
    "endless cache": (state(cacheRows="10000000000000000"), "cacheRows"),
    "negative generation": (state(generation="-1"), "generation"),
    "generation of 5000 digits": (state(generation="9" * 5000), "generation"),
    "same id twice": (state(instances=f"[{live()},{live()}]"), "an id is listed twice"),
    "empty batches": (state(instances=f"[{live(batchSize='0')}]"), "batchSize of 0"),
    "negative latency": (state(instances=f"[{live(latencyS='-1')}]"), "latencyS of -1"),
    "endless latency": (state(instances=f"[{live(latencyS='1e999')}]"), "latencyS"),
    "latency that is no number": (state(instances=f"[{live(latencyS='NaN')}]"), "STATE"),
    "put cut off": (put(1, 0), "does not hold 1 and 0 ranges"),
    "put of 4 billion ranges": (put(0xFFFF_FFFF, 0xFFFF_FFFF, (0, 1)), "does not hold"),
    "put of nothing": (put(0, 0), "PUT of 0 rows"),
    "put from somewhere to nowhere": (put(0, 1, (0, 1)), "PUT of 0 rows"),
    "put of an empty range": (put(1, 0, (0, 0)), "a range is empty"),
    "put that does not add up": (put(1, 1, (0, 2), (0, 3)), "do not add up"),
    "put of too many rows": (put(2, 0, (0, 1 << 24), (0, 1)), "do not add up"),
    "run cut off": (run(1, [(0, 1)])[:-1], "does not hold 1 instances and 1 ranges"),
    "run without its head": (run(1, [])[:20], "RUN of 20 bytes is too short"),
    "run of 4 billion ranges": (run(1, [(0, 1)], count=0xFFFF_FFFF), "does not hold"),
    "run without instances": (run(1, [(0, 1)], many=0), "does not hold 0 instances and 1 ranges"),
    "run of 65 instances": (run(1, [(0, 1)], many=65), "does not hold 65 instances"),
    "run of 4 billion instances": (run(1, [(0, 1)], said=0xFFFF_FFFF), "does not hold 4294967295 instances"),
    "run of fewer instances than it says": (
        run(1, [(0, 1)], many=2, said=3),
        "RUN of 48 bytes does not hold 3 instances",
    ),
    "run of more instances than it says": (run(1, [(0, 1)], many=3, said=2), "does not hold 2 instances"),
    "run of two instances that are a range": (run(1, [(0, 1)], many=3, said=1), "does not hold 1 instances"),
    "run of three instances that are one and a range": (run(1, [(0, 1)], count=0, said=3), "do not add up"),
    "run of a range that is two instances": (run(1, [(0, 1)], many=1, said=3), "does not hold 3 instances"),
    "run of nothing": (run(0, []), "RUN of 0 rows"),
    "run of rows without ranges": (run(1, []), "RUN of 1 rows"),
    "run of an empty range": (run(1, [(0, 1), (5, 0)]), "a range is empty"),
    "run beyond 32 bits": (run(2, [(0xFFFF_FFFF, 2)]), "ends beyond 32 bits"),
    "run that ends just beyond 32 bits": (run(1, [(0xFFFF_FFFF, 1)]), "ends beyond 32 bits"),
    "run that does not add up": (run(4, [(0, 2), (9, 3)]), "do not add up"),
    "run of too many rows": (run((1 << 24) + 1, [(0, (1 << 24) + 1)]), "do not add up"),
    "run to an uneven place": (run(1, [(0, 1)], at=8), "not a multiple of 64"),
    "result without its head": (SEEDS[6][:8], "RESULT of 8 bytes"),
    "short result": (SEEDS[6][:-1], "RESULT of 31 bytes"),
    "long result": (SEEDS[6] + b"\0", "RESULT of 33 bytes"),
    "result of no instance": (result(0, 0), "does not hold the times of 0 instances"),
    "result of 65 instances": (result(65, 65), "does not hold the times of 65 instances"),
    "result of 4 billion instances": (result(1, 0xFFFF_FFFF), "does not hold the times of 4294967295 instances"),
    "result of fewer instances than it says": (result(1, 2), "RESULT of 32 bytes does not hold the times of 2"),
    "result of more instances than it says": (result(3, 2), "RESULT of 48 bytes does not hold the times of 2"),
    "short failure": (SEEDS[7][:15], "FAILED has 15 bytes"),
    "long failure": (SEEDS[7] + bytes(5000), "FAILED has 5018 bytes"),
    "unknown failure": (HEAD.pack(wire.MAGIC, 1, 8, 99) + bytes(8), "failure code 99"),
}


@pytest.mark.parametrize(("frame", "text"), BAD.values(), ids=BAD)
def test_bad_frames_are_named(frame: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        wire.decode(frame)


def survives(frame: bytes) -> None:
    """A message or ProtocolError; what was decoded says no more than the frame can hold."""
    try:
        message = wire.decode(frame)
    except ProtocolError:
        return
    if isinstance(message, wire.Run):
        assert message.rows == sum(message.ranges.counts) <= wire.MAX_ROWS
        assert 1 <= len(message.instances) <= wire.MAX_INSTANCES
        assert len(message.ranges.starts) * 8 + len(message.instances) * 4 < len(frame)
    elif isinstance(message, wire.Result):
        assert 1 <= len(message.compute_ns) <= wire.MAX_INSTANCES
        assert len(message.compute_ns) * 8 < len(frame)


@given(st.binary(max_size=300))
def test_noise(frame: bytes) -> None:
    survives(frame)


@given(kind=st.integers(0, 12), number=st.integers(0, (1 << 32) - 1), rest=st.binary(max_size=200))
def test_noise_behind_a_good_head(kind: int, number: int, rest: bytes) -> None:
    survives(HEAD.pack(wire.MAGIC, wire.PROTOCOL_VERSION, kind, number) + rest)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(kind=st.sampled_from([1, 2]), text=st.binary(max_size=100) | JSON.map(lambda value: repr(value).encode()))
def test_noise_as_json(kind: int, text: bytes) -> None:
    survives(control(kind, text))


@settings(max_examples=50)
@given(st.data())
def test_messages_for_the_other_side_of_a_cut(data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS))
    survives(seed[: data.draw(st.integers(0, len(seed)))])


def test_mutations() -> None:
    """Thirty thousand frames that differ from good ones in a few bytes; the seed makes a failure repeatable."""
    rng = random.Random(20_24)
    began = time.process_time()
    tracemalloc.start()
    try:
        for _ in range(30_000):
            survives(mutated(rng, bytearray(rng.choice(SEEDS))))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert time.process_time() - began < 30


def mutated(rng: random.Random, frame: bytearray) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(frame)) if frame else 0
        match rng.randrange(5):
            case 0 if frame:
                frame[at] = rng.randrange(256)
            case 1:
                frame[at:at] = rng.randbytes(rng.randint(1, 9))
            case 2:
                del frame[at : at + rng.randint(1, 9)]
            case 3:
                frame[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x01\0\0\0", b"\0\0\0\x80"])
            case _:
                frame += frame[at:]
    return bytes(frame)


@pytest.mark.parametrize(
    "frame",
    [
        control(1, b'{"gateway":"' + b"x" * (1 << 20) + b'"}'),
        control(2, b'{"instances":[' + b"[" * (1 << 19)),
        put(1 << 17, 0, *[(0, 0)] * (1 << 17)),
        run(1 << 17, [(5, 1)] * (1 << 17)),
        run(1, [(0, 1)], said=0xFFFF_FFFF),
        run(1, [(0, 1)], many=1 << 18),
        result(1, 0xFFFF_FFFF),
        result(1 << 17, 1 << 17),
        b"\xff" * (1 << 20),
    ],
    ids=[
        "long text",
        "deep json",
        "empty ranges",
        "many ranges",
        "claimed instances",
        "many instances",
        "claimed times",
        "many times",
        "noise",
    ],
)
def test_memory_is_a_small_multiple_of_the_frame(frame: bytes) -> None:
    tracemalloc.start()
    try:
        survives(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frame) + 100_000
