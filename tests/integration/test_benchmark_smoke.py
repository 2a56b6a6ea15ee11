"""The benchmarks run to their end, with real processes and tiny windows: what they say about speed is not looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from benchmarks import cold, colocation, loads, networks, preparation, report, servers, serving
from benchmarks.children import ChildFailed
from benchmarks.peers.mosec_server import MosecSettings
from benchmarks.raw import Group, Layout
from benchmarks.workloads import Workload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
CORES = tuple(sorted(os.sched_getaffinity(0)))[:2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Workload:
    """Two members instead of four: half the time, and nothing left out."""
    folder = cache / "tiny"
    folder.mkdir()
    return preparation.make("tiny", folder, networks.MLPS[:2], (64,), 96, (1, 8, 64))


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_a_prepared_workload_is_not_made_again(cache: Path, tiny: Workload) -> None:
    made = (Path(tiny.folder) / "workload.json").stat().st_mtime_ns
    assert preparation.prepare("tiny", cache) == tiny
    assert (Path(tiny.folder) / "workload.json").stat().st_mtime_ns == made
    assert len(tiny.rows()) >= 64
    np.testing.assert_allclose(tiny.expected_of_members().mean(axis=0), tiny.expected(), rtol=1e-5)


def test_serving_measures_ours_beside_the_raw_bound(
    cache: Path, tiny: Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = children()
    arguments = [
        "--workloads",
        "tiny",
        "--loads",
        "1 client,64 clients,128 rows x 1",
        "--windows",
        "1",
        "--window-s",
        "0.1",
    ]
    code = serving.main([*arguments, "--cache", str(cache), "--json", str(tmp_path / "figures.json")])
    output = capsys.readouterr()
    # 3: a target was missed, which windows so short on a busy machine may well do.
    assert code in (0, 3), output.err
    assert "tiny, memory: ours" in output.out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [c["load"]["name"] for c in figures["cells"]] == [
        "1 client",
        "64 clients",
        "128 rows x 1",
    ]
    assert [m["system"] for m in figures["cells"][0]["systems"]] == ["ours", "ours, tritonclient"]
    for found in figures["cells"]:
        assert all(rate > 0 for rates in found["raw"].values() for rate in rates)
        for measured in found["systems"]:
            (window,) = measured["windows"]
            assert (window["failures"], window["wrong"]) == (0, 0), window["error"]
            assert window["checked"] >= window["requests"] > 0
    assert figures["memory_bytes"]["tiny"]["ours"] > 50 << 20
    assert children() == before


@pytest.mark.parametrize(("processes", "max_batch", "plain"), [(1, 8, False), (2, 1, False), (1, 8, True)])
def test_the_peer_answers_right_and_leaves_nothing(tiny: Workload, processes: int, max_batch: int, plain: bool) -> None:
    before = children()
    logs = Path(tiny.folder) / "logs"
    settings = MosecSettings(tiny.folder, processes, 1, max_batch, 1, CORES * 2, plain)
    with ExitStack() as undo:
        generators = serving.Generators(tiny, logs, undo)
        server = servers.start_mosec(settings, logs)
        undo.callback(server.stop)
        for load in (loads.EIGHT, loads.BULK):
            window = generators.window(server.target, load, 0.1)
            assert (window.failures, window.wrong) == (0, 0), window.error
            assert window.requests > 0
    assert children() == before


def test_a_raw_process_refuses_members_that_answer_wrong(tiny: Workload, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for name in ("rows.npy", "workload.json"):
        (folder / name).write_bytes((Path(tiny.folder) / name).read_bytes())
    expected = tiny.expected_of_members()
    expected[1, 5] += 0.01
    np.save(folder / "expected_of_members.npy", expected)
    changed = Workload("tiny", str(folder), tiny.input, tiny.output, tiny.members, (64,))
    group = Group(changed, Layout(1, 1), [(0, 1)], CORES, tmp_path)
    try:
        with pytest.raises(ChildFailed, match="member 'member1': 1 of 96 answers"):
            group.ready()
    finally:
        group.stop()


def test_colocation_compares_one_process_with_one_for_each(cache: Path, tiny: Workload) -> None:
    before = children()
    measured = colocation.measure(tiny, "cpu", CORES[:1], 1, 0.05)
    assert len(measured) == 2 * len(colocation.BATCHES)
    assert all(rate > 0 for m in measured for rate in (*m.one_at_a_time, *m.stream))
    table = colocation.table(measured)
    assert table.count("| one process, 1 thread |") == len(colocation.BATCHES)
    assert children() == before


def test_what_a_core_costs_that_has_slept_is_measured(tiny: Workload) -> None:
    """In a process of its own, for it stays on one core."""
    command = [sys.executable, "-m", "benchmarks.cold", "--rounds", "3", "--cache", str(Path(tiny.folder).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("a wake-up from another core: ")
    table = [line.split("|")[2:-1] for line in done.stdout.splitlines() if line.startswith(("| 1 ", "| 8 ", "| 128 "))]
    assert len(table) == len(cold.ROWS)
    assert all(len(row) == len(cold.GAPS_MS) and min(int(cell.replace(",", "")) for cell in row) > 0 for row in table)


def test_a_benchmark_that_is_told_to_end_stops_its_servers(tiny: Workload) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--workloads", "tiny", "--loads", "1 client"]
    cache = str(Path(tiny.folder).parent)
    with subprocess.Popen([*command, "--window-s", "60", "--cache", cache], stdout=subprocess.DEVNULL) as running:
        started = psutil.Process(running.pid)
        try:
            deadline = time.monotonic() + 200
            family: list[psutil.Process] = []
            while not any(_is_gateway(one) for one in family):
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
                family = started.children(recursive=True)
            running.terminate()
            assert running.wait(60) == 128 + signal.SIGTERM
        finally:
            running.kill()
    _, left = psutil.wait_procs(family, timeout=20)
    assert not left


def _is_gateway(process: psutil.Process) -> bool:
    """False too for one that has ended meanwhile."""
    try:
        return "ensemble_gateway" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_cannot_start_says_why(tiny: Workload, tmp_path: Path) -> None:
    (tmp_path / "ensemble.yaml").write_text("kind: Nonsense\n")
    broken = Workload("tiny", str(tmp_path), tiny.input, tiny.output, tiny.members, (1,))
    with pytest.raises(ChildFailed, match="ended with exit code") as failed:
        servers.start_ours(broken, "ours", (), tmp_path)
    assert "Nonsense" in str(failed.value) or "kind" in str(failed.value)


def test_memory_and_cells_survive_a_round_trip_through_json(tmp_path: Path) -> None:
    import msgspec

    made = report.Report(
        {"cores": "2"}, 0.1, 1, (report.Cell("tiny", loads.ONE, {"1x1": (2.0,)}, {"1x1": (1.0,)}, ()),), {}
    )
    assert msgspec.json.decode(msgspec.json.encode(made), type=report.Report) == made
