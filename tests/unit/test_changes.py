"""What a change did and what a status says, from plans alone."""

import msgspec
from rich.console import Console

from ensemble_contract.plan import ModelSource
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.api import parse
from ensemble_operator.fleet import GatewayState, MemberState, WorkerReport
from ensemble_operator.plans import Tensors
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.serve.applying import plan_to_serve
from ensemble_operator.serve.change import Change, change_of, status_of
from ensemble_operator.serve.observation import Observed
from ensemble_operator.serve.preparation import Planned
from ensemble_operator.serve.summary import change_lines

MIB = 1 << 20


def planned(members: dict[str, str], sizes: list[list[int]], rows_per_s: float) -> Planned:
    """Members by name with the digests of their files."""
    resource = parse(
        {
            "apiVersion": "ensemble-operator.io/v1alpha1",
            "kind": "InferenceEnsemble",
            "metadata": {"name": "trio"},
            "spec": {
                "members": [{"name": name, "model": {"uri": f"file:///m/{name}.pt2"}} for name in members],
                "input": {"name": "x", "datatype": "FP32", "shape": [4]},
                "output": {"name": "y", "datatype": "FP32", "shape": [3]},
            },
        }
    )
    devices = {name: Device(name, "cpu", "K", 100 * MIB, (at,)) for at, name in enumerate(("cpu-0", "cpu-1"))}
    problem = Problem(
        tuple(Member(name) for name in members),
        tuple(DeviceSpec(name, "K", "cpu", 100 * MIB, 10 * MIB) for name in devices),
        tuple(Profile(name, "K", 8, 10.0, 0.1, MIB) for name in members),
        (8,),
    )
    sources = {n: ModelSource(n, digest, f"file:///m/{n}.pt2", "torch-export") for n, digest in members.items()}
    tensors = Tensors(resource.spec.inputs, resource.spec.outputs, {})
    matrix = Matrix.of(problem, sizes)
    return Planned(resource, devices, sources, tensors, problem, matrix, rows_per_s, 2 * rows_per_s, {})


BEFORE = planned({"a": "1", "b": "1"}, [[8, 0], [8, 8]], 100.0)
AFTER = planned({"b": "2", "c": "1"}, [[8, 8], [0, 8]], 150.0)


def shown(change: Change) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for part in change_lines(change):
            console.print(part)
    return capture.get()


def test_a_change_names_what_came_went_and_was_replaced() -> None:
    change = change_of(BEFORE, AFTER, "http://h:1", 3, 1.25)
    assert (change.added, change.removed, change.replaced) == (("c",), ("a",), ("b",))
    assert change.before.rows == {"cpu-0": {"a": 8}, "cpu-1": {"a": 8, "b": 8}}
    assert change.after.used_bytes == {"cpu-0": 12 * MIB, "cpu-1": 11 * MIB}
    assert msgspec.json.decode(msgspec.json.encode(change), type=Change) == change
    text = shown(change)
    assert text.index("before:") < text.index("now:") < text.index("trio changed in 3 steps and 1.2 s")
    assert "added c; removed a; replaced b" in text
    assert "predicted throughput: 100 -> 150 rows/s" in text


def test_the_matrix_is_shown_once_where_it_is_the_same_and_not_without_a_change() -> None:
    same = shown(change_of(BEFORE, BEFORE, "", 1, 0.1))
    assert "before:" not in same
    assert "in 1 step and" in same
    assert shown(change_of(BEFORE, BEFORE, "", 0, 0.1)).strip() == "trio is as wanted already"


def test_a_status_says_what_is_held_and_what_is_missing() -> None:
    plan = plan_to_serve(BEFORE, {"cpu-0": "unix:/r/0", "cpu-1": "unix:/r/1"}, 7)
    gateway = GatewayState(7, True, "http://h:1", (MemberState("a", True, 2), MemberState("b", False)))
    status = status_of(BEFORE, plan, Observed(gateway, {"cpu-0": WorkerReport(7), "cpu-1": None}, {}), changing=False)
    assert status["phase"] == "Degraded"
    assert status["members"] == {"total": 2, "live": 1, "summary": "1/2"}
    assert status["devices"] == {"wanted": 2, "held": 1, "summary": "1/2"}
    assert status["allocation"]["generation"] == 7
    assert status["allocation"]["rows"][1]["instances"] == [
        {"member": "a", "batchSize": 8},
        {"member": "b", "batchSize": 8},
    ]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Ready": "True",
        "Degraded": "True",
        "Progressing": "False",
    }
    away = status_of(BEFORE, plan, Observed(None, {"cpu-0": None, "cpu-1": None}, {}), changing=True)
    assert (away["phase"], away["url"]) == ("Changing", "")
