"""The pure parts of the benchmarks: layouts of the raw bound, shares, verdicts, the table, the command line."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from benchmarks import allocation, loads, report, serving
from benchmarks.children import Child, ChildFailed
from benchmarks.colocation import Measured as Colocated
from benchmarks.colocation import verdict, ways
from benchmarks.loadgen import WindowResult
from benchmarks.raw import Layout, divide, layouts, shares_of
from benchmarks.raw_process import Ready
from benchmarks.servers import mosec_candidates
from benchmarks.workloads import Workload
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.profiles.measurements import Measurement, Point

WORKLOAD = Workload("tiny", "/nowhere", TensorSpec("x", "FP32", (4,)), TensorSpec("y", "FP32", (2,)), (), (1, 8))


def windows(*rates: float, wrong: int = 0, cpu_share: float = 0.1) -> tuple[WindowResult, ...]:
    return tuple(WindowResult(100, rate, 1.0, 2.0, 0, wrong, 100, cpu_share, 5.0) for rate in rates)


def cell(*systems: report.Measured, raw: float = 200.0, plain_raw: float = 100.0) -> report.Cell:
    return report.Cell("tiny", loads.MANY, {"2x1": (raw, raw)}, {"2x1": (plain_raw, plain_raw)}, systems)


def test_layouts_use_up_to_all_cores_and_divide_only_what_can_be() -> None:
    assert [str(x) for x in layouts(2, 4)] == ["1x1", "1x2", "2x1", "2x1 divided"]
    assert all(x.processes * x.threads <= 16 for x in layouts(16, 4))
    assert {x.processes for x in layouts(16, 4) if x.divided} == {2, 4}
    assert {x.processes for x in layouts(6, 4)} == {1, 2, 4, 6}
    assert layouts(1, 64) == [Layout(1, 1)]


@given(rows=st.integers(0, 5000), processes=st.integers(1, 64))
def test_a_round_is_shared_out_whole_and_evenly(rows: int, processes: int) -> None:
    shares = shares_of(rows, Layout(processes, 1))
    assert sum(shares) == rows
    assert max(shares) - min(shares) <= 1
    assert shares_of(rows, Layout(processes, 1, divided=True)) == [rows] * processes


@given(times=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=64), parts=st.integers(1, 8))
def test_members_are_divided_completely_and_as_well_as_lpt_promises(times: list[float], parts: int) -> None:
    shares = divide(times, parts)
    assert sorted(itertools.chain(*shares)) == list(range(len(times)))
    longest = max(sum(times[m] for m in share) for share in shares)
    # Graham 1969: at most 4/3 of the optimum, which is at least the mean and the longest member.
    lower = max(sum(times) / parts, max(times))
    assert longest <= sum(times) / parts + max(times) + 1e-9
    assert longest >= lower - 1e-9


def test_divide_balances_by_time() -> None:
    assert divide([4.0, 1.0, 1.0, 2.0], 2) == [(0,), (1, 2, 3)]


def test_the_bound_is_the_best_setting_by_its_median() -> None:
    measured = {"1x1 batch 8": (10.0, 100.0, 20.0), "2x1 batch 4": (30.0, 31.0, 32.0)}
    assert report.bound(measured) == ("2x1 batch 4", 31.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ((5, 5, 5, 5, 5), (4, 4, 4, 4, 4), "ahead"),
        ((5, 5, 5, 5, 3), (4, 4, 4, 4, 4), "ahead"),
        ((5, 5, 5, 3, 3), (4, 4, 4, 4, 4), "tie"),
        ((3, 3, 3, 3, 5), (4, 4, 4, 4, 4), "behind"),
        ((1,), (2,), "behind"),
    ],
)
def test_a_tie_is_said_to_be_a_tie(ours: tuple[float, ...], theirs: tuple[float, ...], says: str) -> None:
    assert report.verdict(ours, theirs) == says


def test_promises_that_are_not_met_are_listed() -> None:
    target = loads.target_of("tiny", "ours", loads.MANY)
    assert target == loads.Target(0.18, 0.08)
    mosec = report.Measured("mosec", windows(10, 10))
    met = cell(report.Measured("ours", windows(30, 30), target=target), mosec)
    assert report.unmet([met]) == []
    assert "| | | ours | 30 | 1.00 | 2.00 | 0.15 | 0.30 | 3.00 | 10% | target 0.18 met; " in report.table([met])
    plain = report.Measured("mosec, plain members", windows(40, 40))
    behind = cell(report.Measured("ours", windows(30, 30), target=target), mosec, plain)
    assert report.unmet([behind]) == ["tiny, 64 clients, ours: mosec, plain members: behind"]
    missed = cell(
        report.Measured("ours", windows(17, 17, wrong=1, cpu_share=0.95), target=target),
        report.Measured("mosec", windows(20, 20)),
        raw=18.0,
    )
    said = "\n".join(report.unmet([missed]))
    assert "target 0.18 MISSED" in said
    assert "mosec: behind" in said
    assert "2 FAILED OR WRONG" in said
    assert "Triton" not in said
    assert "the load generator is what limits" in report.table([missed])


def test_every_promised_cell_is_measured() -> None:
    measured = {(w, load.name) for w, of in loads.LOADS_OF.items() for load in of}
    assert {(w, load) for w, _, load in loads.TARGETS} <= measured


def test_the_peer_is_tried_with_batches_that_its_load_can_fill() -> None:
    found = {(s.processes, s.threads, s.max_batch) for s in mosec_candidates(WORKLOAD, loads.MANY, (0, 1))}
    assert found == {(1, 1, 1), (1, 1, 64), (1, 2, 1), (1, 2, 64), (2, 1, 1), (2, 1, 32)}
    assert {s.max_batch for s in mosec_candidates(WORKLOAD, loads.BULK, (0, 1))} == {1}


@pytest.mark.parametrize(("slower", "says"), [(1.0, "as fast or faster"), (0.97, "as fast or faster"), (0.8, "SLOWER")])
def test_what_colocation_settles_is_said(slower: float, says: str) -> None:
    measured = [
        Colocated("tiny", way, batch, (rate,) * 3, (2 * rate,) * 3, memory)
        for batch in (1, 8)
        for way, rate, memory in (
            ("one process, 1 thread", 100.0 * slower, 300),
            ("one process, 2 threads", 50.0, 310),
            ("a process each, 1 thread", 100.0, 600),
            ("a process each, 2 threads", 90.0, 610),
        )
    ]
    said = verdict(measured)
    assert f"{slower:.2f} times the rows/s one at a time ({slower:.2f} to {slower:.2f})" in said
    assert f"{slower:.2f} times the rows/s stream" in said
    assert "in 0.50 of the memory" in said
    assert says in said


def test_ways_of_colocation_hold_every_member_once() -> None:
    for device, cores in (("cpu", 1), ("cpu", 2), ("cuda-0", 1)):
        for way in ways(4, cores, device):
            assert sorted(itertools.chain(*way.members)) == [0, 1, 2, 3]
    assert len(ways(4, 1, "cpu")) == 2
    assert len(ways(4, 2, "cpu")) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workloads", "huge"], "'huge' is not one of tiny, cnn, imagenet"),
        (["--peers", "triton"], "'triton' is not one of mosec"),
        (["--loads", "1 client,7 clients"], "'7 clients' is not one of"),
        (["--links", "tcp"], "zeromq, zeromq-curve"),
        (["--windows", "0"], "at least 1"),
        (["--window-s", "nan"], "above 0"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serving.parse(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    child = Child("benchmarks.raw_process", ["not JSON", str(os.getpid())], tmp_path / "log")
    try:
        with pytest.raises(ChildFailed, match="exit code 1") as failed:
            child.hear(Ready, 60.0)
        assert "malformed" in str(failed.value)
    finally:
        child.stop()


def test_ways_to_plan_are_compared_with_the_baseline_and_with_what_was_predicted() -> None:
    rates = {
        "start": (50.0, 60.0),
        "best batch": (100.0, 100.0),
        "greedy-paper": (150.0, 190.0),
        "ours": (210.0, 190.0),
    }
    found = [
        allocation.Measured("digits", way, ((1,),), windows, predicted=1.1 * sum(windows) / 2, networks_alone=999.0)
        for way, windows in rates.items()
    ]
    table = allocation.live_table(found)
    assert "| digits | ours | 200.0 | 190.0 to 210.0 | 2.00 | 220.0 | 10% | 999.0 |" in table
    assert "median error 10%, which is within" in table
    off = [allocation.Measured("digits", "best batch", ((1,),), (100.0,), 150.0, 150.0)]
    assert "median error 50%, which MISSES the aim of 15%" in allocation.live_table(off)


def test_profiles_of_several_rounds_count_by_their_medians() -> None:
    def measured(**rates: tuple[float, ...]) -> allocation.Profiles:
        return {
            (name, "K"): Measurement(
                points=tuple(Point(8 * at, rate, 8 * at / rate, 7) for at, rate in enumerate(found, 1)),
                overhead_bytes=9,
            )
            for name, found in rates.items()
        }

    rounds = [measured(a=(100.0, 400.0), b=(10.0,)), measured(a=(300.0,), b=(20.0,)), measured(a=(200.0,), b=(40.0,))]
    found = allocation.median_profiles(rounds)
    assert [(p.batch_size, p.rows_per_s, p.latency_s) for p in found["a", "K"].points] == [
        (8, 200.0, 0.04),
        (16, 400.0, 0.04),
    ]
    assert found["b", "K"].points[0].rows_per_s == 20.0
    assert (found["b", "K"].overhead_bytes, found["b", "K"].points[0].memory_bytes) == (9, 7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--ensembles", "huge"], "'huge' is not one of"), (["--rounds", "0"], "at least 1"), (["--only", "x"], "live")],
)
def test_a_wrong_question_about_allocations_says_what_is_right(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        allocation.parse(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
