"""What a worker keeps of its measuring: points, and the batch size that memory did not suffice for."""

from __future__ import annotations

from pathlib import Path

from ensemble_contract.plan import ModelSource
from ensemble_worker.profile_store import Found, Point, ProfileStore

MIB = 1 << 20
SOURCE = ModelSource("cat", "digest", "file:///cat.pt2", "torch-export")


def point(size: int) -> Point:
    return Point(size, 10.0 * size, 0.1, MIB)


def test_what_ran_out_of_memory_is_kept_until_there_is_more(tmp_path: Path) -> None:
    found = Found().with_point(point(1)).with_failure(32, 400 * MIB, "too big")
    ProfileStore(tmp_path, "K").keep(SOURCE, found)
    kept = ProfileStore(tmp_path, "K").recall(SOURCE)
    assert kept == found
    assert kept.missing((1, 8, 32, 64), 400 * MIB) == (8,)
    assert kept.missing((1, 8, 32, 64), 450 * MIB) == (8,), "what is spare varies"
    assert kept.missing((1, 8, 32, 64), 800 * MIB) == (8, 32, 64)
    assert kept.with_point(point(8)).missing((8, 32), 400 * MIB) == ()
    better = kept.with_point(point(32))
    assert better.missing((32, 64), 400 * MIB) == (64,)
    assert (better.failed_size, better.error) == (0, "")


def test_without_a_limit_what_failed_is_not_tried_again() -> None:
    found = Found().with_point(point(1)).with_failure(8, None, "too big")
    assert found.missing((1, 4, 8)) == (4,)
