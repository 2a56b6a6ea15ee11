"""The ring: order, wrap-around, fullness, two processes; and memory that the other side has spoilt."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.errors import ProtocolError
from ensemble_contract.ring import HEADER_BYTES, Ring
from ensemble_gateway.links.memory import SharedMemory

CAPACITY = 1024


def ring_memory(capacity: int = CAPACITY) -> memoryview:
    return memoryview(bytearray(HEADER_BYTES + capacity))


def position(memory: memoryview, index: int) -> memoryview:
    return memory[:HEADER_BYTES].cast("Q")[index : index + 1]


def test_records_come_in_order_and_once() -> None:
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert reader.pop_all() == []
    assert all(writer.push(record) for record in (b"", b"a", b"bc" * 100))
    assert reader.pop_all() == [b"", b"a", b"bc" * 100]
    assert reader.pop_all() == []


def test_a_full_ring_takes_no_record_until_it_is_read() -> None:
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    pushed = 0
    while writer.push(pushed.to_bytes(4, "little")):
        pushed += 1
    assert pushed == CAPACITY // 8
    assert not writer.push(b"")
    assert [int.from_bytes(record, "little") for record in reader.pop_all()] == list(range(pushed))
    assert writer.push(b"again")
    assert reader.pop_all() == [b"again"]


def test_a_record_that_might_never_fit_is_refused() -> None:
    writer = Ring(ring_memory())
    assert writer.push(bytes(CAPACITY // 2 - 4))
    with pytest.raises(ValueError, match="over half"):
        writer.push(bytes(CAPACITY // 2 - 3))


@pytest.mark.parametrize("capacity", [0, 8, 1016, 1025, 1028])
def test_sizes_that_are_no_ring(capacity: int) -> None:
    with pytest.raises(ValueError, match="a multiple of 8 and at least 1024"):
        Ring(ring_memory(capacity))


@given(st.lists(st.one_of(st.binary(max_size=CAPACITY // 2 - 4), st.none()), max_size=200))
def test_any_interleaving(steps: list[bytes | None]) -> None:
    """Records pushed (None: read all) come out as they went in, over many rounds of the ring."""
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    waiting: list[bytes] = []
    for record in steps:
        if record is None or not writer.push(record):
            assert reader.pop_all() == waiting
            waiting = []
            if record is None:
                continue
            assert writer.push(record), "an empty ring has room for any record of half its size"
        waiting.append(record)
    assert reader.pop_all() == waiting


WRITER = """
import mmap, sys, time
from ensemble_contract.ring import Ring
fd, size, count = map(int, sys.argv[1:])
writer = Ring(memoryview(mmap.mmap(fd, size)))
for number in range(count):
    while not writer.push(number.to_bytes(8, "little") * (1 + number % 5)):
        time.sleep(0)
"""


def test_two_processes() -> None:
    count, size = 50_000, HEADER_BYTES + CAPACITY
    shared = SharedMemory("ring-test", size)
    arguments = [str(number) for number in (shared.fd, size, count)]
    process = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], pass_fds=(shared.fd,))
    try:
        reader, expected = Ring(shared.memory), 0
        deadline = time.monotonic() + 30
        while expected < count and time.monotonic() < deadline:
            for record in reader.pop_all():
                assert record == expected.to_bytes(8, "little") * (1 + expected % 5)
                expected += 1
        assert expected == count
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)
        shared.close()


# -- a hostile other side ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [4, CAPACITY + 8, 1 << 40, (1 << 64) - 8])
def test_an_impossible_position_of_the_writer(written: int) -> None:
    memory = ring_memory()
    reader = Ring(memory)
    position(memory, 0)[0] = written
    with pytest.raises(ProtocolError, match="positions are impossible"):
        reader.pop_all()


@pytest.mark.parametrize("read", [8, 1 << 40, (1 << 64) - 8])
def test_an_impossible_position_of_the_reader(read: int) -> None:
    memory = ring_memory()
    writer = Ring(memory)
    position(memory, 8)[0] = read
    with pytest.raises(ProtocolError, match="positions are impossible"):
        writer.push(b"x")


def test_a_writer_that_goes_back() -> None:
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert writer.push(b"0123456789ab")
    assert reader.pop_all() == [b"0123456789ab"]
    position(memory, 0)[0] = 8
    with pytest.raises(ProtocolError, match="positions are impossible"):
        reader.pop_all()


def test_own_positions_are_not_read_from_the_memory() -> None:
    """What the peer writes over our own position changes nothing for us."""
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert writer.push(b"one")
    position(memory, 8)[0] = 1 << 33
    assert reader.pop_all() == [b"one"]
    position(memory, 0)[0] = 1 << 50
    assert writer.push(b"two")
    assert reader.pop_all() == [b"two"]


@pytest.mark.parametrize("length", [13, CAPACITY, 0xFFFF_FFFE, 0xFFFF_FFFF])
def test_an_impossible_length(length: int) -> None:
    """The last is the mark of a wrap, which is none at the ring's beginning."""
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert writer.push(b"0123456789ab")
    memory[HEADER_BYTES : HEADER_BYTES + 4] = length.to_bytes(4, "little")
    with pytest.raises(ProtocolError, match=r"beyond the ring|wraps around nothing"):
        reader.pop_all()


def test_a_wrap_beyond_what_was_written() -> None:
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert writer.push(b"0123")
    assert reader.pop_all() == [b"0123"]
    assert writer.push(b"0123")
    memory[HEADER_BYTES + 8 : HEADER_BYTES + 12] = b"\xff" * 4
    with pytest.raises(ProtocolError, match="wraps around nothing"):
        reader.pop_all()


def test_noise_over_the_whole_memory() -> None:
    """Twenty thousand spoilt rings: records or ProtocolError, never more bytes than a ring has, no endless loop."""
    rng = random.Random(7)
    began = time.process_time()
    tracemalloc.start()
    try:
        for _ in range(20_000):
            memory = ring_memory()
            writer, reader = Ring(memory), Ring(memory)
            for _ in range(rng.randrange(6)):
                writer.push(rng.randbytes(rng.randrange(200)))
            for _ in range(rng.randint(1, 4)):
                spoil(rng, memory)
            both_sides_survive(writer, reader)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert time.process_time() - began < 30


def spoil(rng: random.Random, memory: memoryview) -> None:
    match rng.randrange(4):
        case 0:
            position(memory, rng.choice([0, 8]))[0] = rng.choice([rng.getrandbits(64), rng.randrange(0, 2048, 8)])
        case 1:
            at = HEADER_BYTES + rng.randrange(0, CAPACITY, 8)
            memory[at : at + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, rng.randbytes(4), b"\x10\0\0\0"])
        case 2:
            at = rng.randrange(len(memory))
            memory[at] = rng.randrange(256)
        case _:
            memory[HEADER_BYTES:] = rng.randbytes(CAPACITY)


def both_sides_survive(writer: Ring, reader: Ring) -> None:
    for _ in range(2):
        with contextlib.suppress(ProtocolError):
            assert sum(len(record) + 4 for record in reader.pop_all()) <= CAPACITY
        with contextlib.suppress(ProtocolError):
            writer.push(b"more")


def test_positions_lie_on_cache_lines_of_their_own() -> None:
    memory = ring_memory()
    writer, reader = Ring(memory), Ring(memory)
    assert writer.push(b"x")
    reader.pop_all()
    touched = [index for index, byte in enumerate(memory[:HEADER_BYTES]) if byte]
    assert touched == [0, 64]
