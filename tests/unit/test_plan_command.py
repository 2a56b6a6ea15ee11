"""`ensemble plan` with described clusters: the question put together from files, the answer as table, text and plot."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from ensemble_operator import cli
from ensemble_operator.allocation import planner
from ensemble_operator.allocation.described import described
from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.options import PlanOptions
from ensemble_operator.allocation.planner import plan
from ensemble_operator.planning.cluster_file import composed
from ensemble_operator.planning.matrix_table import matrix_table, series_table

MIB = 1 << 20


def profile(member: str, size: int, *, rows_per_s: float = 100.0, mib: int = 100, on: str = "gpu") -> dict[str, Any]:
    where = {"member": member, "deviceClass": on, "batchSize": size}
    return {**where, "rowsPerS": rows_per_s, "latencyS": size / rows_per_s, "memoryBytes": mib * MIB}


def cluster(
    *, count: int = 2, members: tuple[str, ...] = ("a", "b"), mib: int = 1000, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "name": "pair",
        "source": "made up",
        "batchSizes": [1, 8],
        "headroom": 0.0,
        "devices": [{"class": "gpu", "kind": "cuda", "count": count, "capacityMiB": mib}],
        "members": [{"name": name} for name in members],
        "profiles": [profile(m, s, rows_per_s=100.0 * s, mib=200 + s) for m in members for s in (1, 8)],
        **(more or {}),
    }


SERIES = {"class": "gpu", "kind": "cuda", "capacityMiB": 1000}

ENSEMBLE = """
apiVersion: ensemble-operator.io/v1alpha1
kind: InferenceEnsemble
metadata: {name: pair}
spec:
  members:
  - {name: a, model: {uri: "file:a.pt2"}}
  - name: b
    model: {uri: "file:b.pt2"}
    profile: {measurements: [{batchSize: 8, memory: 208Mi, latency: 10ms}]}
  devices: {count: 1, resource: nvidia.com/gpu, memoryHeadroom: 0%}
  planning: {strategy: exact}
"""


def written(path: Path, document: object) -> str:
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def run(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def shown(document: dict[str, Any], width: int) -> list[str]:
    _, problem = described(document).problems[0]
    console = Console(width=width)
    with console.capture() as capture:
        console.print(matrix_table(problem, plan(problem, PlanOptions(), clock=lambda: 0.0), width))
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def test_the_table_of_a_small_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(written(tmp_path / "c.yaml", cluster(mib=500))) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.strip().startswith("gpu-")}
    assert cells == {
        "gpu-0": ["◀", "8", "8", "416", "84", "100%"],
        "gpu-1": ["◀", "8", "8", "416", "84", "100%"],
    }
    assert any(line.startswith("predicted 800.0 rows/s · bound 800.0 rows/s · gap 0.0%") for line in lines)


def test_the_document_is_the_same_in_json_and_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "c.yaml", cluster())
    assert run(file, "-o", "json", "--explain") == 0
    found = json.loads(capsys.readouterr().out)
    assert run(file, "-o", "yaml", "--explain") == 0
    same = yaml.safe_load(capsys.readouterr().out)
    for document in (found, same):
        del document["plans"][0]["seconds"]
    assert found == same
    (only,) = found["plans"]
    assert only["predictedRowsPerS"] == pytest.approx(800)
    assert [row["instances"] for row in only["matrix"]] == [{"a": 8, "b": 8}] * 2
    assert {use["member"] for use in only["explanation"]["instances"]} == {"a", "b"}


def test_many_interchangeable_devices_are_one_line() -> None:
    lines = shown(cluster(count=1000), 120)
    assert len([line for line in lines if "gpu" in line]) == 1
    assert any(line.strip().startswith("1000 x gpu ◀") for line in lines)


def test_many_members_turn_the_table_on_its_side() -> None:
    members = tuple(f"network-{i:02}" for i in range(30))
    lines = shown(cluster(members=members, mib=10_000), 80)
    assert [line.split()[0] for line in lines if line.strip().startswith("network")] == list(members)
    assert any(line.split()[:2] == ["MiB", "used"] for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_where_neither_fits_devices_list_their_members() -> None:
    lines = shown(cluster(members=tuple(f"a-rather-long-name-{i}" for i in range(8)), count=8, mib=4000), 70)
    assert any("a-rather-long-name-0 x8" in line for line in lines)


def test_a_series_is_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = cluster()
    document["devices"][0] |= {"counts": [1, 2, 4]}
    del document["devices"][0]["count"]
    assert run(written(tmp_path / "c.yaml", document), "-o", "json") == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [p["devices"] for p in plans] == ["1 x gpu", "2 x gpu", "4 x gpu"]
    assert [p["predictedRowsPerS"] for p in plans] == pytest.approx([400, 800, 1600])
    problems = described(document).problems
    table = series_table([(label, plan(p, PlanOptions(), clock=lambda: 0.0)) for label, p in problems])
    assert table.row_count == 3


def test_an_ensemble_for_devices_and_with_profiles_of_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "e.yaml", ENSEMBLE)
    inventory = written(tmp_path / "i.yaml", {"devices": cluster(count=3)["devices"]})
    profiles = written(tmp_path / "p.yaml", {"profiles": [profile("a", 8, rows_per_s=800.0)]})
    assert run(file, "--inventory", inventory, "--profiles", profiles, "-o", "json", "--explain") == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert found["devices"] == "3 x gpu"
    assert found["predictedRowsPerS"] == pytest.approx(1200)
    assert any(line.startswith("exact:") for line in found["explanation"]["tried"])
    assert run(file, "--inventory", inventory, "--profiles", profiles, "-o", "json", "--strategy", "greedy") == 0
    assert "exact:" not in capsys.readouterr().out


def test_what_the_solver_prints_is_no_part_of_a_document(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def talkative(*args: Any, **kwargs: Any) -> Any:
        os.write(1, b"a line of the solver\n")
        return plan(*args, **kwargs)

    monkeypatch.setattr(planner, "plan", talkative)
    assert run(written(tmp_path / "c.yaml", cluster()), "-o", "json") == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["plans"]
    assert "a line of the solver" in said.err


def test_the_fewest_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "c.yaml", cluster(count=8))
    assert run(file, "--objective", "devices", "--target-throughput", "700") == 0
    assert "devices: 2 of 8 used; proven: at least 2" in capsys.readouterr().out
    assert run(file, "--objective", "devices", "--target-throughput", "4000") == 0
    assert "the target is missed by 800.0 rows/s" in capsys.readouterr().out
    assert run(file, "--objective", "devices") == 3
    assert f"{file}: objective devices needs a target throughput" in capsys.readouterr().err


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "m.png"
    assert run(written(tmp_path / "c.yaml", cluster()), "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(written(tmp_path / "c.yaml", cluster()), "--plot", str(tmp_path / "m.png")) == 1
    assert "pip install 'ensemble-operator[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "arguments", "code", "message"),
    [
        (cluster(mib=200), (), 5, "fits on no device: it needs 201 MiB at batch size 1"),
        (cluster(more={"devices": []}), (), 3, "c.yaml: devices"),
        (cluster(more={"batchSizes": [1, 8, 64]}), (), 3, "batch size 64 can be run by no member"),
        (cluster(more={"surprise": 1}), (), 3, "c.yaml: document.surprise: unknown field"),
        (cluster(members=("a", "a")), (), 3, "member 'a' is listed 2 times"),
        (cluster(more={"devices": [SERIES | {"counts": []}]}), (), 3, "c.yaml: devices[0].counts: at least one count"),
        (cluster(more={"profiles": [profile("a", 1, rows_per_s=float("nan"))]}), (), 3, "rows/s must be a finite"),
        (cluster(more={"profiles": 3}), (), 3, "profiles: expected a list"),
        ("just a text", (), 3, "c.yaml"),
        ("a: [", (), 3, "line 1, column"),
        ("devices: !!int", (), 3, "c.yaml: line 1, column 10: not YAML: '' is no int"),
        ("{}", (), 3, "c.yaml"),
        (cluster(), ("--inventory", "/does/not/exist"), 3, "/does/not/exist: cannot be read: No such file"),
        (cluster(), ("--plot", "/no/such/folder/x.png"), 1, "there is no folder /no/such/folder"),
        (cluster(), ("--plot", "x.gif"), 1, "must end in .png"),
    ],
    ids=[
        "memory", "no devices", "size", "field", "twice", "series", "nan", "type", "text", "yaml", "tag", "empty",
        "inventory", "folder", "suffix",
    ],
)  # fmt: skip
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    document: object,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    assert run(written(tmp_path / "c.yaml", document), *arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("ensemble: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("seed", ["-1", "2147483648", "x"])
def test_a_seed_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(written(tmp_path / "c.yaml", cluster()), f"--seed={seed}")
    assert ended.value.code == 2
    assert f"{seed!r} is not a whole number in 0..2147483647" in capsys.readouterr().err


def test_an_inventory_without_devices_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = written(tmp_path / "i.yaml", {"device": []})
    assert run(written(tmp_path / "c.yaml", cluster()), "--inventory", inventory) == 3
    assert f"{inventory}: devices: a list is expected here" in capsys.readouterr().err


class TestComposed:
    def test_profiles_of_elsewhere_win(self) -> None:
        better = {"profiles": [profile("a", 8, rows_per_s=4000.0)]}
        ((_, problem),) = composed(cluster(), None, better, "x").problems
        rates = {(p.member, p.batch_size): p.rows_per_s for p in problem.profiles}
        assert rates == {("a", 1): 100.0, ("a", 8): 4000.0, ("b", 1): 100.0, ("b", 8): 800.0}

    def test_the_factor_of_a_class_comes_with_its_profiles(self) -> None:
        alone = [profile(m, 8, rows_per_s=800.0) for m in "ab"]
        told = {"profiles": alone, "devices": [{"class": "gpu", "colocation": 0.5}, {"class": "other"}]}
        devices = cluster(count=1)["devices"]
        for inventory in (None, {"devices": devices}, {"devices": [{**devices[0], "colocation": 0.9}]}):
            ((_, problem),) = composed(cluster(count=1), inventory, told, "x").problems
            assert problem.colocation == {"gpu": 0.5}
            # Each would answer 800 rows/s alone, together they have half a device.
            assert plan(problem, PlanOptions(), clock=lambda: 0.0).predicted_rows_per_s == pytest.approx(200)
        with pytest.raises(InvalidProblem, match=r"x: devices\[0\].colocation"):
            composed(cluster(), None, {**told, "devices": [{"class": "gpu", "colocation": "much"}]}, "x")

    def test_a_profile_twice_in_one_file_is_a_fault(self) -> None:
        with pytest.raises(InvalidProblem, match=r"x: profile .* is listed 2 times"):
            composed(cluster(), None, {"profiles": [profile("a", 8)] * 2}, "x")

    def test_facts_of_an_inventory_estimate_what_is_not_measured(self) -> None:
        devices = [{**cluster()["devices"][0], "tflops": 10.0, "gbPerS": 900.0}]
        facts = {"name": "a", "parametersMillion": 10.0, "gmacs": 1.0, "activationsMillion": 1.0}
        bare = cluster(members=("a",), more={"profiles": [profile("a", 1)]})
        ((_, problem),) = composed(bare, {"devices": devices, "members": [facts]}, None, "x").problems
        rates = {p.batch_size: p.rows_per_s for p in problem.profiles}
        assert rates[1] == 100.0
        assert rates[8] == pytest.approx(8 / (8 * 2e9 / 1e13 + 4e7 / 9e11))

    def test_what_failed_elsewhere_is_no_matter_here(self) -> None:
        assert composed(cluster(more={"failures": [{"member": "c"}]}), None, None, "x").name == "pair"
