"""`protocol.md` and the code say the same: types, codes, offsets, fields and limits."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ensemble_contract import layout, ring, wire
from ensemble_gateway import links as gateway_links
from ensemble_gateway.links import shared as gateway_shared
from ensemble_gateway.links import zeromq as gateway_zeromq
from ensemble_worker.links import zeromq as worker_zeromq

DOCUMENT = (Path(wire.__file__).parent / "protocol.md").read_text()
FLAT = " ".join(DOCUMENT.split())


def section(title: str) -> str:
    """The text under a heading, up to the next heading."""
    found = re.search(rf"^#+ (?:\d\. )?{re.escape(title)}\n(.*?)(?=^#|\Z)", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_message_types() -> None:
    documented = {row[1]: int(row[0]) for row in table(section("Messages"), "type")}
    assert documented == {kind.name: kind.value for kind in wire.MessageType}


def test_failure_codes() -> None:
    documented = {row[1]: int(row[0]) for row in table(section("FAILED"), "code")}
    assert documented == {code.name: code.value for code in wire.FailureCode}


def test_the_head() -> None:
    rows = table(section("Messages"), "offset")
    assert [(int(row[0]), int(row[1])) for row in rows] == [(0, 2), (2, 1), (3, 1), (4, 4)]
    assert offsets(wire._HEAD) == [0, 2, 3, 4]
    assert f"`0x{wire.MAGIC:X}`, the bytes `{wire.PING[:2].decode()}`" in rows[0][2]


def offsets(form: struct.Struct) -> list[int]:
    """Where each field of a struct begins."""
    codes = form.format.removeprefix("<")
    return [struct.calcsize("<" + codes[:number]) for number in range(len(codes))]


@pytest.mark.parametrize(
    ("name", "form"), [("PUT", wire._PUT), ("RUN", wire._RUN), ("RESULT", wire._RESULT), ("FAILED", wire._FAILED)]
)
def test_offsets(name: str, form: struct.Struct) -> None:
    """The head's four fields are one line in the document; what follows the fixed part begins on the next line."""
    rows = table(section(name), "offset")
    fixed = len(offsets(form)) - 3
    assert [int(row[0]) for row in rows[: fixed + 1]] == [0, *offsets(form)[4:], form.size]
    assert sum(int(row[1]) for row in rows[:fixed]) == form.size


def test_what_follows_the_fixed_part_of_a_run() -> None:
    """First the instances, then the ranges."""
    instances, ranges = table(section("RUN"), "offset")[-2:]
    assert [row[1] for row in (instances, ranges)] == ["4 each", "8 each"]
    assert ranges[0] == f"{wire._RUN.size} + 4 an instance"
    run = wire.encode_run(1, [11, 12, 13], 5, 0, [(7, 5)])
    assert run[wire._RUN.size :] == struct.pack("<5I", 11, 12, 13, 7, 5)


def test_what_follows_the_fixed_part_of_a_result() -> None:
    assert table(section("RESULT"), "offset")[-1][1] == "8 each"
    assert wire.encode_result(1, 2, [11, 12])[wire._RESULT.size :] == struct.pack("<2Q", 11, 12)


def test_how_many_instances() -> None:
    many = next(row[2] for row in table(section("RUN"), "offset") if row[2].startswith("instances"))
    assert many == f"instances: how many, 1 to {wire.MAX_INSTANCES}"
    heads = {row[1]: row[3] for row in table(section("Messages"), "type")}
    assert (heads["RUN"], heads["RESULT"]) == ("ranges", "instances")
    assert struct.unpack_from("<I", wire.encode_run(1, [1, 2, 3], 2, 0, [(0, 1), (4, 1)]), 4) == (2,)
    assert struct.unpack_from("<I", wire.encode_result(1, 2, [3, 4, 5]), 4) == (3,)


def test_a_range_has_eight_bytes() -> None:
    assert wire._PAIR.size == 8
    assert "A **range** is 8 bytes: its first slot (4) and how many slots (4)" in FLAT


def fields_of(form: type[msgspec.Struct], prefix: str = "") -> set[str]:
    """Names as they are in the JSON, nested ones with their path."""
    nested: dict[str, tuple[Any, str]] = {
        "shared": (wire.SharedLayout, "shared."),
        "instances": (wire.LiveInstance, "instances[]."),
    }
    names = set()
    for field in msgspec.structs.fields(form):
        names.add(prefix + field.encode_name)
        if field.name in nested:
            names |= fields_of(*nested[field.name])
    return names


@pytest.mark.parametrize("form", [wire.Hello, wire.State])
def test_json_fields(form: type[msgspec.Struct]) -> None:
    documented = {row[0].strip("`") for row in table(section(form.__name__.upper()), "field")}
    assert documented == fields_of(form)


def test_limits() -> None:
    documented = {row[0]: int(row[1]) for row in table(section("Limits"), "name")}
    assert documented == {name: getattr(wire, name) for name in documented}
    constants = {n for n in vars(wire) if re.fullmatch(r"(MAX|MIN)_[A-Z_]+|MAGIC|PROTOCOL_VERSION|[A-Z]+_ALIGNMENT", n)}
    assert set(documented) == constants


def test_version_of_the_document() -> None:
    assert DOCUMENT.startswith(f"# The wire between gateway and worker, version {wire.PROTOCOL_VERSION}\n")


def test_the_ring() -> None:
    rows = table(section("Shared memory"), "offset")
    assert [row[0] for row in rows] == ["0", "64", str(ring.HEADER_BYTES)]
    assert f"`0x{ring._WRAP:X}`" in DOCUMENT
    assert wire.MIN_RING_BYTES == ring.HEADER_BYTES + 1024
    assert wire.MIN_RING_BYTES <= gateway_shared.RING_BYTES <= wire.MAX_RING_BYTES


def test_a_ring_has_room_for_the_longest_record() -> None:
    """A PUT of a batch whose rows are all apart; with it, a record takes at most half."""
    longest = 4 + wire._PUT.size + 16 * wire.MAX_BATCH_ROWS
    assert longest <= (gateway_shared.RING_BYTES - ring.HEADER_BYTES) // 2
    assert longest <= wire.MAX_FRAME_BYTES


def test_alignments() -> None:
    assert wire.RESULT_ALIGNMENT == layout.ALIGNMENT
    assert f"each from a multiple of {layout.ALIGNMENT} bytes on" in FLAT
    assert f"from a page of {layout.PAGE} bytes on" in FLAT


@pytest.mark.parametrize(
    "sentence",
    [
        f"Both sides send PING every {gateway_links.HEARTBEAT_S:.0f} s.",
        f"lost after {gateway_links.SILENCE_S:.0f} s in which it heard nothing",
        f"connects anew {gateway_zeromq.RECONNECT_S:.0f} s later",
        f"drops a gateway after {worker_zeromq.SILENCE_S:.0f} s of silence",
        f"after {gateway_shared.REFUSED_RETRY_S:.0f} s, if it never got a STATE",
        f"{gateway_shared.RETRY_S * 1000:.0f} ms else, in shared memory",
        f"longer than {wire.MAX_FRAME_BYTES >> 20} MiB and the largest tensor",
    ],
)
def test_times_and_sizes_in_the_text(sentence: str) -> None:
    assert sentence in FLAT


def test_both_sides_beat_at_the_same_rate() -> None:
    assert gateway_links.HEARTBEAT_S == worker_zeromq.HEARTBEAT_S < gateway_links.SILENCE_S / 2
