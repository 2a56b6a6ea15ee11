"""What `ensemble profile` shows and writes, and that `ensemble plan` understands it."""

import json

import pytest
from rich.console import Console

from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.problem import Profile
from ensemble_operator.api import parse_yaml
from ensemble_operator.bar import Bar
from ensemble_operator.planning.cluster_file import composed
from ensemble_operator.profiles.measurements import Device, Measurement, Point, Signature
from ensemble_operator.profiles.profiling import Profiled
from ensemble_operator.profiles.progress_notes import MemberProgress
from ensemble_operator.profiles.report import profile_document, profile_table, remarks
from ensemble_operator.profiles.serving_cost import ServingCost

MIB = 1 << 20
CLASS = "cpu, 1 core"
ENSEMBLE = parse_yaml(
    """
apiVersion: ensemble-operator.io/v1alpha1
kind: InferenceEnsemble
metadata: {name: pair}
spec:
  members:
  - {name: a, model: {uri: "file:a.pt2"}}
  - {name: b, model: {uri: "file:b.pt2"}}
  combine: {rule: mean, quorum: 1}
  devices: {count: 1, resource: cpu, cores: 1, memory: 1Gi, memoryHeadroom: 20%}
  batching: {sizes: [1, 8, 64], maxQueueBytes: 100Mi}
""",
    source="pair.yaml",
)
GOOD = Measurement(
    Signature((TensorSpec("x", "FP32", (4,)),), None),
    (Point(1, 100.0, 0.01, 10 * MIB, 0.07), Point(8, 400.0, 0.02, 12 * MIB)),
    300 * MIB,
)


def profiled(**measured: Measurement) -> Profiled:
    devices = tuple(Device(f"cpu-{i}", "cpu", CLASS, (1000 + i) * MIB, (i,)) for i in range(2))
    return Profiled(ENSEMBLE, devices, {(m, CLASS): found for m, found in measured.items()}, 1, 2.0)


def test_the_document_is_a_cluster_that_can_be_planned() -> None:
    document = json.loads(json.dumps(profile_document(profiled(a=GOOD, b=GOOD))))
    found = composed(document, None, None, "profiles.yaml")
    ((label, problem),) = found.problems
    assert (found.name, label) == ("pair", f"2 x {CLASS}")
    assert problem.headroom == pytest.approx(0.2)
    assert problem.batch_sizes == (1, 8)
    assert Profile("a", CLASS, 8, 400.0, 0.02, 12 * MIB) in problem.profiles
    # An idle worker's 300 MiB, and half of a row store of 100 MiB.
    assert {(d.capacity_bytes, d.overhead_bytes) for d in problem.devices} == {(1000 * MIB, 350 * MIB)}


def test_a_member_that_fails_is_named_and_left_out() -> None:
    found = profiled(a=GOOD, b=Measurement(error="no such file"))
    document = profile_document(found)
    assert document["members"] == [{"name": "a"}]
    assert document["failures"] == [{"member": "b", "deviceClass": CLASS, "error": "no such file"}]
    assert composed(document, None, None, "profiles.yaml").problems
    assert remarks(found) == [f"b on {CLASS}: no such file", "2 profiles (1 measured anew) in 2.0 s"]


def test_a_cost_of_serving_that_varied_is_remarked_on() -> None:
    steady, varied = (remarks(profiled(a=GOOD), ServingCost(1e-3, 1e-5, spread)) for spread in (0.1, 0.6))
    assert not any("differ" in line for line in steady)
    assert any("in windows that differ by 60%" in line for line in varied)


def test_the_table_has_a_line_for_every_batch_size() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(profile_table(profiled(a=GOOD, b=Measurement(error="no such file"))))
    lines = [line.split() for line in capture.get().splitlines() if f" {CLASS} " in line]
    assert [line[4:] for line in lines] == [
        ["1", "100.0", "10.00", "7%", "10.0"],
        ["8", "400.0", "20.00", "0%", "12.0"],
        ["-", "-", "-", "-", "-"],
    ]


def test_progress_says_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(2, "profiling") as bar:
        progress = MemberProgress(bar, ENSEMBLE.spec.batching.sizes, 2)
        progress.report("measuring a on cpu-0")
        progress.finished("a", CLASS, GOOD)
        progress.finished("b", CLASS, Measurement(error="no such file"))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "measuring a on cpu-0",
        f"a on {CLASS}: not measured, for want of time or of hope for more: 64",
        f"b on {CLASS}: no such file",
    ]
    assert progress.measured == 1
