"""The wire's messages: golden bytes, which `protocol.md` promises to peers, and round trips."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract import wire
from ensemble_contract.errors import ProtocolError
from ensemble_contract.wire import FailureCode

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
STATE = wire.State(
    worker="cpu-0",
    generation=7,
    instances=(wire.LiveInstance(3, "lite0", "sha256:ab", 16, 0.25),),
    serial=True,
    credits=2,
    cache_rows=512,
    device_class="cpu",
    put_with_run=True,
)

GOLDEN: dict[str, tuple[bytes, str]] = {
    "hello": (
        wire.encode_control(wire.Hello("gw-0")),
        (
            "454f01012d000000 "
            "7b2267617465776179223a2267772d30222c2270726f746f636f6c223a312c22736861726564223a6e756c6c7d"
        ),
    ),
    "hello in shared memory": (
        wire.encode_control(wire.Hello("gw-0", shared=wire.SharedLayout(8192, 64, 4224, 65536))),
        (
            "454f01016b000000 7b2267617465776179223a2267772d30222c2270726f746f636f6c223a312c22736861726564223a7b "
            "2273746f72654279746573223a383139322c22736c6f7473223a36342c2272696e674279746573223a343232342c "
            "226172656e614279746573223a36353533367d7d"
        ),
    ),
    "state": (
        wire.encode_control(STATE),
        (
            "454f0102cd000000 "
            "7b22776f726b6572223a226370752d30222c2267656e65726174696f6e223a372c22696e7374616e636573223a5b "
            "7b226964223a332c226d656d626572223a226c69746530222c22646967657374223a227368613235363a6162222c "
            "22626174636853697a65223a31362c226c6174656e637953223a302e32357d5d2c "
            "2273657269616c223a747275652c2263726564697473223a322c226361636865526f7773223a3531322c "
            "22646576696365436c617373223a22637075222c227075745769746852756e223a747275657d"
        ),
    ),
    "ping": (wire.PING, "454f010300000000"),
    "bye": (wire.BYE, "454f010400000000"),
    "put": (
        wire.encode_put([(5, 2), (9, 1)]),
        "454f0105000000000200000000000000 05000000020000000900000001000000",
    ),
    "put from the store": (
        wire.encode_put([(5, 3)], [(1000, 2), (70000, 1)]),
        "454f0105000000000100000002000000 0500000003000000 e8030000020000007011010001000000",
    ),
    "run of one range": (
        wire.encode_run(0x0102030405060708, [3], 4, 0x40, [(10, 4)]),
        "454f0106010000000807060504030201 0100000004000000 4000000000000000 03000000 0a00000004000000",
    ),
    "run of three ranges": (
        wire.encode_run(1, [2], 6, 0, [(7, 1), (0, 3), (4294967293, 2)]),
        (
            "454f0106030000000100000000000000 0100000006000000 0000000000000000 02000000 "
            "0700000001000000 0000000003000000 fdffffff02000000"
        ),
    ),
    "run of three instances and two ranges": (
        wire.encode_run(5, (9, 1, 0xFFFFFFFF), 3, 0x1000, [(4, 1), (8, 2)]),
        (
            "454f0106020000000500000000000000 0300000003000000 0010000000000000 09000000 01000000 ffffffff "
            "0400000001000000 0800000002000000"
        ),
    ),
    "result": (
        wire.encode_result(1, 30_000, [2_000_000]),
        "454f0107010000000100000000000000 3075000000000000 80841e0000000000",
    ),
    "result of three instances": (
        wire.encode_result(5, 0, (1, 0x0102030405060708, 2)),
        (
            "454f0107030000000500000000000000 0000000000000000 "
            "0100000000000000 0807060504030201 0200000000000000"
        ),
    ),
    "failed": (
        wire.encode_failed(9, FailureCode.OUT_OF_MEMORY, "größer"),
        "454f0108030000000900000000000000 6772c3b6c39f6572",
    ),
}  # fmt: skip


def ranges_strategy(most: int = 40) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ranges that end inside 32 bits, of at most 2^24 rows together."""
    one = st.tuples(st.integers(0, (1 << 32) - 1 - (1 << 16)), st.integers(1, 1 << 16))
    return st.lists(one, min_size=1, max_size=most)


def pairs(ranges: wire.RowRanges) -> list[tuple[int, int]]:
    return list(zip(ranges.starts, ranges.counts, strict=True))


@pytest.mark.parametrize(("message", "golden"), GOLDEN.values(), ids=GOLDEN)
def test_golden_bytes(message: bytes, golden: str) -> None:
    assert message.hex() == golden.replace(" ", "")


def test_every_type_has_golden_bytes() -> None:
    assert {bytes.fromhex(golden)[3] for _, golden in GOLDEN.values()} == {int(kind) for kind in wire.MessageType}


@pytest.mark.parametrize("golden", [golden for _, golden in GOLDEN.values()], ids=GOLDEN)
def test_golden_bytes_are_understood(golden: str) -> None:
    as_bytes = bytes.fromhex(golden)
    message = wire.decode(as_bytes)
    assert message == wire.decode(memoryview(as_bytes))
    assert type(message).__name__.upper() == wire.MessageType(as_bytes[3]).name


def test_decoded_golden_messages_say_what_was_meant() -> None:
    def golden(name: str) -> wire.Message:
        return wire.decode(bytes.fromhex(GOLDEN[name][1]))

    assert golden("state") == STATE
    assert golden("hello") == wire.Hello("gw-0")
    put, run, failed = golden("put from the store"), golden("run of three instances and two ranges"), golden("failed")
    assert isinstance(put, wire.Put)
    assert (pairs(put.cache), pairs(put.source)) == ([(5, 3)], [(1000, 2), (70000, 1)])
    assert isinstance(run, wire.Run)
    assert (run.batch, run.instances, run.rows, run.result_offset) == (5, (9, 1, 4294967295), 3, 0x1000)
    assert pairs(run.ranges) == [(4, 1), (8, 2)]
    assert golden("result of three instances") == wire.Result(5, 0, (1, 0x0102030405060708, 2))
    assert failed == wire.Failed(9, FailureCode.OUT_OF_MEMORY, "größer")


@given(
    batch=U64,
    instances=st.lists(U32, min_size=1, max_size=wire.MAX_INSTANCES),
    at=st.integers(0, (1 << 58) - 1),
    ranges=ranges_strategy(),
)
def test_run_round_trip(batch: int, instances: list[int], at: int, ranges: Sequence[tuple[int, int]]) -> None:
    rows = sum(count for _, count in ranges)
    run = wire.decode(wire.encode_run(batch, instances, rows, 64 * at, ranges))
    assert isinstance(run, wire.Run)
    assert (run.batch, run.instances, run.rows, run.result_offset) == (batch, tuple(instances), rows, 64 * at)
    assert (pairs(run.ranges), run.ranges.rows) == (list(ranges), rows)


@given(cache=ranges_strategy(), source=ranges_strategy(), sourced=st.booleans())
def test_put_round_trip(cache: list[tuple[int, int]], source: list[tuple[int, int]], sourced: bool) -> None:
    """Both sides say the same number of rows, in different ranges."""
    rows = min(sum(count for _, count in ranges) for ranges in (cache, source))
    cache, source = cut(cache, rows), cut(source, rows)
    put = wire.decode(wire.encode_put(cache, source if sourced else ()))
    assert isinstance(put, wire.Put)
    assert (pairs(put.cache), put.cache.rows) == (cache, rows)
    assert pairs(put.source) == (source if sourced else [])


def cut(ranges: list[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
    kept = []
    for start, count in ranges:
        taken = min(count, rows)
        rows -= taken
        if taken:
            kept.append((start, taken))
    return kept


@given(batch=U64, queue=U64, compute=st.lists(U64, min_size=1, max_size=wire.MAX_INSTANCES))
def test_result_round_trip(batch: int, queue: int, compute: list[int]) -> None:
    assert wire.decode(wire.encode_result(batch, queue, compute)) == wire.Result(batch, queue, tuple(compute))


@given(batch=U64, code=st.sampled_from(FailureCode), text=st.text(st.characters(exclude_categories=["Cs"])))
def test_failed_round_trip(batch: int, code: FailureCode, text: str) -> None:
    failed = wire.decode(wire.encode_failed(batch, code, text))
    assert isinstance(failed, wire.Failed)
    assert (failed.batch, failed.code) == (batch, code)
    assert failed.text == text or len(text.encode()) > wire.MAX_TEXT_BYTES


def test_failed_text_is_cut_and_never_refused() -> None:
    """Also inside a character, and where a file's name is no UTF-8."""
    for text in ("x" * 10_000, "ä" * 4096 + "x", "x" + "ä" * 4096, "\udcff" * 3):
        encoded = wire.encode_failed(1, FailureCode.MODEL_ERROR, text)
        assert len(encoded) <= 16 + wire.MAX_TEXT_BYTES
        failed = wire.decode(encoded)
        assert isinstance(failed, wire.Failed)
        assert failed.text[:2] in (text[:2], "??")


NAMES = st.text(min_size=1, max_size=20)
INSTANCES = st.lists(
    st.builds(
        wire.LiveInstance,
        id=U32, member=NAMES, digest=NAMES, batch_size=st.integers(1, 65_536), latency_s=st.floats(0, 1e6),
    ),
    max_size=5, unique_by=lambda instance: instance.id,
).map(tuple)  # fmt: skip
STATES = st.builds(
    wire.State,
    worker=NAMES, generation=st.integers(0, (1 << 63) - 1), instances=INSTANCES, serial=st.booleans(),
    credits=st.integers(1, 1024), cache_rows=U32, device_class=NAMES,
)  # fmt: skip


@given(state=STATES)
def test_state_round_trip(state: wire.State) -> None:
    assert wire.decode(wire.encode_control(state)) == state


def test_a_state_of_64_members_on_a_device_fits_easily() -> None:
    live = tuple(wire.LiveInstance(i, f"member-{i}" * 6, "f" * 64, 128, 0.001) for i in range(64))
    assert len(wire.encode_control(wire.State("w", 1, live, True, 2))) < 100_000


def test_a_control_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match=r"HELLO of 1\d{6} bytes is over the limit of 1048576"):
        wire.encode_control(wire.Hello("x" * (1 << 20)))


def test_numbers_on_the_wire_have_four_bytes_whatever_the_platform_calls_them() -> None:
    assert array(wire._U32).itemsize == 4
    assert wire.encode_run(0, [0], 2, 0, [(1, 1), (2, 1)])[-16:] == bytes(
        [1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
    )
