"""Profiles on disk: which batch sizes are still to be measured, what is added to what, what a broken file is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.profiles.kept import Kept, KeptProfiles, key_of, merged, missing_sizes, selected
from ensemble_operator.profiles.measurements import Measurement, Point, Signature, measurement_of

GIB = 1 << 30
X = TensorSpec("x", "FP32", (4,))


def point(size: int, rate: float) -> Point:
    return Point(size, rate, size / rate, 1000 * size, 0.1)


def kept(*points: Point, budget_s: float = 2.0, **more: object) -> Kept:
    return Kept(Measurement(points=points, overhead_bytes=7), budget_s, GIB, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "sizes", "budget_s", "capacity_bytes", "missing"),
    [
        (Kept(), (8, 1), 2.0, GIB, (1, 8)),
        (kept(point(1, 10), point(32, 40)), (1, 32), 2.0, GIB, ()),
        # Between what is known, at any budget: `serve` has measured 1 and 32.
        (kept(point(1, 10), point(32, 40)), (1, 8, 16, 32), 2.0, GIB, (8, 16)),
        # Beyond it only with more time than there was.
        (kept(point(1, 10), point(32, 40)), (32, 64, 128), 2.0, GIB, ()),
        (kept(point(1, 10), point(32, 40)), (32, 64, 128), 4.0, GIB, (64, 128)),
        # Larger batches had stopped to bring more.
        (kept(point(1, 10), point(32, 10.1)), (32, 64), 400.0, GIB, ()),
        # Out of memory is a result, until there is more memory.
        (kept(point(1, 10), failed_size=32), (1, 8, 32, 64), 400.0, GIB, (8,)),
        (kept(point(1, 10), failed_size=32), (1, 8, 32, 64), 400.0, 2 * GIB, (8, 32, 64)),
        # A model of a fixed batch.
        (kept(point(16, 10), fixed=True), (1, 8, 16, 64), 400.0, GIB, ()),
    ],
)
def test_what_is_still_to_be_measured(
    known: Kept, sizes: tuple[int, ...], budget_s: float, capacity_bytes: int, missing: tuple[int, ...]
) -> None:
    assert missing_sizes(known, sizes, budget_s, capacity_bytes) == missing


@given(st.lists(st.sets(st.sampled_from((1, 2, 4, 8, 16, 32, 64)), min_size=1), min_size=1, max_size=6))
def test_nothing_is_measured_twice_whoever_asks(questions: list[set[int]]) -> None:
    known = Kept()
    measured: list[int] = []
    for sizes in questions:
        missing = missing_sizes(known, tuple(sizes), 1e9, GIB)
        measured += missing
        found = Measurement(points=tuple(point(size, 10.0 * size) for size in missing))
        known = merged(known, found, missing, 1.0, GIB)
        assert {p.batch_size for p in selected(known, tuple(sizes)).points} == sizes
    assert len(measured) == len(set(measured))


def test_a_failure_is_kept_with_its_size_and_told_only_to_those_who_ask_for_it() -> None:
    lines = ('{"batchSize":1,"rowsPerS":10,"latencyS":0.1,"memoryBytes":5}', '{"error":"too big","batchSize":8}')
    found = measurement_of(lines)
    assert [p.batch_size for p in found.points] == [1]
    known = merged(Kept(), found, (1, 8, 64), 2.0, GIB)
    assert known.failed_size == 8
    assert selected(known, (1, 8)).error == "too big"
    assert selected(known, (1,)).error == ""
    larger = merged(known, Measurement(points=(point(8, 50.0),)), (8,), 4.0, 2 * GIB)
    assert (larger.failed_size, selected(larger, (1, 8)).error) == (0, "")


@pytest.mark.parametrize("sizes", [(1, 8), (8, 16), (32, 64)])
def test_a_model_of_a_fixed_batch_is_measured_once(sizes: tuple[int, ...]) -> None:
    known = merged(Kept(), Measurement(points=(point(16, 10),)), sizes, 1.0, GIB)
    assert missing_sizes(known, sizes, 1e9, 2 * GIB) == ()
    assert selected(known, sizes).points == (point(16, 10),)


def test_what_is_new_wins_and_the_rest_stays() -> None:
    before = kept(point(1, 10), point(8, 20))
    told = Signature((X,), None)
    after = merged(before, Measurement(told, (point(8, 40),), 9), (8,), 1.0, GIB // 2)
    assert after.measurement == Measurement(told, (point(1, 10), point(8, 40)), 9)
    assert (after.budget_s, after.capacity_bytes) == (2.0, GIB)


def test_files_are_read_back_and_broken_ones_are_nothing(tmp_path: Path) -> None:
    files = KeptProfiles(tmp_path / "profiles")
    assert files.read("k") == Kept()
    files.write("k", kept(point(1, 10)))
    assert files.read("k") == kept(point(1, 10))
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["k.json"]
    for broken in ("", "{", json.dumps({"measurement": {"points": 3}})):
        (tmp_path / "profiles" / "k.json").write_text(broken)
        assert files.read("k") == Kept()


def test_the_key_is_of_the_model_the_class_and_the_tensors_not_of_the_batch_sizes() -> None:
    source = ModelSource("a", "digest", "file:///a.pt2", "torch-export")
    key = key_of(source, "K", (X,), ())
    renamed = ModelSource("b", "digest", "file:///b.pt2", "torch-export")
    assert key_of(renamed, "K", (X,), ()) == key
    other = ModelSource("a", "another", "file:///a.pt2", "torch-export")
    half = TensorSpec("x", "FP16", (4,))
    assert (
        len({key, key_of(other, "K", (X,), ()), key_of(source, "L", (X,), ()), key_of(source, "K", (half,), ())}) == 4
    )
