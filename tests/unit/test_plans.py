"""From measurements to a planning problem, and from a matrix to plans that contract and peers accept."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.plan import EnsemblePlan, GatewayPlan, decode_plan, encode_plan
from ensemble_contract.tensors import TensorSpec
from ensemble_operator.allocation.errors import InvalidProblem
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.worstfit import fill, worst_fit
from ensemble_operator.api import InferenceEnsemble, InvalidSpec, parse
from ensemble_operator.plans import Tensors, ensemble_plan, gateway_plan, model_source
from ensemble_operator.profiles.held import planning_problem
from ensemble_operator.profiles.measurements import (
    UNMEASURED_OVERHEAD_BYTES,
    Device,
    Measurement,
    NotUnderstood,
    Point,
    Signature,
    agreed_tensors,
    declared,
    devices_of,
    measurement_of,
    sizes_to_measure,
)

MIB = 1 << 20
X = TensorSpec("x", "FP32", (4,))
Y = TensorSpec("y", "FP32", (3,))


def ensemble(**spec: object) -> InferenceEnsemble:
    members = [{"name": name, "model": {"uri": f"file:///m/{name}.pt2"}} for name in ("a", "b", "c")]
    return parse(
        {
            "apiVersion": "ensemble-operator.io/v1alpha1",
            "kind": "InferenceEnsemble",
            "metadata": {"name": "three"},
            "spec": {"members": members, **spec},
        }
    )


DECLARED_TENSORS = {
    "input": {"name": "x", "datatype": "FP32", "shape": [4]},
    "output": {"name": "y", "datatype": "FP32", "shape": [3], "labels": ["r", "g", "b"]},
}


class TestSizesToMeasure:
    @pytest.mark.parametrize(
        ("allowed", "measured"),
        [
            ((1, 8, 16, 32, 64, 128), (1, 8, 32, 128)),
            ((1,), (1,)),
            ((64,), (64,)),
            ((4, 256), (4, 256)),
            ((1, 2, 4), (1, 4)),
            ((2, 7, 9, 30, 200), (2, 7, 9, 30, 200)),
            ((1, 2, 4, 8, 16, 32), (1, 4, 8, 32)),
            ((8, 16, 32), (8, 32)),
            ((1, 8, 32, 64, 128, 256, 512, 1024), (1, 8, 32, 128, 512)),
        ],
    )
    def test_smallest_and_nearest_to_the_landmarks(self, allowed: tuple[int, ...], measured: tuple[int, ...]) -> None:
        assert sizes_to_measure(allowed) == measured

    @given(st.sets(st.integers(1, 65_536), min_size=1, max_size=64))
    def test_a_few_of_the_allowed_with_the_smallest(self, allowed: set[int]) -> None:
        measured = sizes_to_measure(sorted(allowed))
        assert set(measured) <= allowed
        assert measured[0] == min(allowed)
        assert list(measured) == sorted(set(measured))
        assert len(measured) <= 7


class TestMeasurementLines:
    def test_head_points_and_error(self) -> None:
        found = measurement_of(
            [
                '{"signature": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}], "outputs": null}}',
                '{"loadS": 0.2, "memoryBytes": 1000, "overheadBytes": 5000}',
                '{"batchSize": 1, "rowsPerS": 100.5, "latencyS": 0.01, "spread": 0.1, "memoryBytes": 2000}',
                '{"batchSize": 8, "rowsPerS": 400, "latencyS": 0.02, "spread": 0.1, "memoryBytes": 3000}',
                '{"error": "no memory at 32 rows", "kind": "memory"}',
            ]
        )
        points = (Point(1, 100.5, 0.01, 2000, spread=0.1), Point(8, 400, 0.02, 3000, spread=0.1))
        assert found == Measurement(Signature((X,), None), points, 5000, "no memory at 32 rows")

    @pytest.mark.parametrize("line", ["", "Killed", "[]", '{"batchSize": "one"}', '{"batchSize": 1'])
    def test_anything_else_is_refused(self, line: str) -> None:
        with pytest.raises(NotUnderstood):
            measurement_of([line])

    def test_devices(self) -> None:
        text = (
            '{"devices": [{"name": "cpu-0", "kind": "cpu", "deviceClass": "K", "cores": [0, 1], "capacityBytes": 9}]}'
        )
        assert devices_of(text) == (Device("cpu-0", "cpu", "K", 9, (0, 1)),)
        with pytest.raises(NotUnderstood):
            devices_of("{}")


class TestAgreedTensors:
    def test_the_resource_wins(self) -> None:
        told = {"a": Signature((TensorSpec("other", "FP16", (1,)),), None)}
        assert agreed_tensors(ensemble(**DECLARED_TENSORS), told) == ((X,), (Y,))

    def test_else_the_models_that_tell(self) -> None:
        told = {"a": Signature(), "b": Signature((X,), (Y,)), "c": Signature((X,), None)}
        assert agreed_tensors(ensemble(), told) == ((X,), (Y,))

    def test_models_that_differ_and_models_that_do_not_tell(self) -> None:
        told = {"a": Signature((X,), None), "b": Signature((Y,), None)}
        with pytest.raises(InvalidSpec) as caught:
            agreed_tensors(ensemble(), told)
        assert [str(problem) for problem in caught.value.problems] == [
            "spec.input: is not given, and the models differ: 'a' has x FP32 [4], 'b' has y FP32 [3]",
            "spec.output: is not given, and no model tells: declare it",
        ]


def test_a_declared_profile_is_taken_for_its_class_or_for_any() -> None:
    def costs(device_class: str, memory: str) -> dict[str, object]:
        return {"deviceClass": device_class, "batchSize": 8, "memory": memory, "latency": "4ms"}

    members = [
        {
            "name": "a",
            "model": {"uri": "file:///m/a.pt2"},
            "profile": {"measurements": [costs("K", "1Mi"), costs("*", "2Mi")]},
        }
    ]
    member = ensemble(members=members).spec.members[0]
    assert declared(member, "K").points == (Point(8, 2000, 0.004, MIB),)
    assert declared(member, "another").points == (Point(8, 2000, 0.004, 2 * MIB),)
    assert declared(ensemble().spec.members[0], "K").points == ()


class TestPlanningProblem:
    devices = (Device("cpu-0", "cpu", "K", 1000 * MIB, (0,)), Device("cpu-1", "cpu", "K", 1000 * MIB, (1,)))

    def test_overheads_sizes_and_unloadable_members(self) -> None:
        measured = {
            ("a", "K"): Measurement(
                points=(Point(1, 10, 0.1, MIB), Point(8, 20, 0.4, 2 * MIB)), overhead_bytes=100 * MIB
            ),
            ("b", "K"): Measurement(points=(Point(4, 10, 0.1, MIB),), overhead_bytes=120 * MIB),
            ("c", "K"): Measurement(error="no such file"),
        }
        problem = planning_problem(
            self.devices, measured, sizes=(1, 4, 8), headroom=0.2, held_bytes={"cpu": 30 * MIB, "cuda": 7}
        )
        assert [m.name for m in problem.members] == ["a", "b"]
        assert problem.batch_sizes == (1, 4, 8)
        assert [d.overhead_bytes for d in problem.devices] == [150 * MIB] * 2
        assert problem.headroom == 0.2
        matrix = fill(problem, worst_fit(problem))
        assert matrix.sizes.tolist() == [[8, 4], [8, 4]]

    def test_only_the_batch_sizes_of_the_spec_are_planned_and_that_of_a_model_that_takes_no_other(self) -> None:
        points = tuple(Point(size, 10.0 * size, 0.1, MIB) for size in (1, 8, 64))
        measured = {
            ("a", "K"): Measurement(points=points),
            ("fixed", "K"): Measurement(Signature(fixed_batch=16), (Point(16, 50, 0.3, MIB),)),
        }
        problem = planning_problem(self.devices, measured, sizes=(8, 32), headroom=0.1, held_bytes={})
        assert {(p.member, p.batch_size) for p in problem.profiles} == {("a", 8), ("fixed", 16)}
        assert problem.batch_sizes == (8, 16)
        with pytest.raises(InvalidProblem) as refusal:
            planning_problem(self.devices, measured, sizes=(2, 32), headroom=0.1, held_bytes={})
        assert (
            "member 'a' is profiled at batch sizes 1, 8, 64, none of which is in the spec's batching.sizes (2, 32)"
            in (str(refusal.value))
        )

    def test_an_overhead_that_nobody_measured(self) -> None:
        measured = {("a", "K"): Measurement(points=(Point(1, 10, 0.1, MIB),))}
        problem = planning_problem(self.devices, measured, sizes=(1,), headroom=0.1, held_bytes={})
        assert problem.devices[0].overhead_bytes == UNMEASURED_OVERHEAD_BYTES


class TestPlans:
    matrix = Matrix(("cpu-0", "cpu-1"), ("a", "b"), [[8, 0], [1, 32]])  # type: ignore[arg-type]
    tensors = Tensors((X,), (Y,), {"y": ("r", "g", "b")})

    def test_workers_get_what_is_placed_on_them(self) -> None:
        resource = ensemble()
        sources = {m.name: model_source(m, m) for m in resource.spec.members}
        addresses = {"cpu-0": "unix:/run/0", "cpu-1": "unix:/run/1", "cpu-2": "unix:/run/2"}
        gateway = gateway_plan(resource, 7, sources, self.tensors, addresses)
        plan = ensemble_plan(gateway, self.matrix, sources, 1 << 20)
        assert decode_plan(encode_plan(plan), EnsemblePlan) == plan
        rows = {name: plan.worker(name) for name in addresses}
        assert [(i.member, i.batch_size) for i in rows["cpu-1"].instances] == [("a", 1), ("b", 32)]  # type: ignore[union-attr]
        assert [m.name for m in rows["cpu-0"].members] == ["a"]  # type: ignore[union-attr]
        for name, row in rows.items():
            assert row is not None
            assert (row.worker, row.generation, row.row_cache_bytes) == (name, 7, 1 << 20)
        assert rows["cpu-2"].instances == ()  # type: ignore[union-attr]

    def test_the_gateway_gets_every_member_placed_or_not(self) -> None:
        resource = ensemble(
            **DECLARED_TENSORS,
            combine={"rule": "mean", "quorum": 2},
            batching={"sizes": [1, 8], "maxDelay": "2ms", "maxQueueBytes": "64Mi"},
            gateway={"timeout": "5s"},
        )
        sources = {m.name: model_source(m, m) for m in resource.spec.members}
        addresses = {"cpu-0": "unix:/run/0", "cpu-1": "tcp://127.0.0.1:5"}
        plan = gateway_plan(resource, 7, sources, self.tensors, addresses)
        assert [m.name for m in plan.members] == ["a", "b", "c"]
        assert [(w.name, w.address) for w in plan.workers] == list(addresses.items())
        assert (plan.rule, plan.quorum, plan.timeout_s, plan.max_delay_s) == ("mean", 2, 5.0, 0.002)
        assert (plan.max_queue_bytes, plan.labels, plan.ensemble) == (64 * MIB, {"y": ("r", "g", "b")}, "three")
        assert decode_plan(encode_plan(plan), GatewayPlan) == plan

    def test_gateway_and_worker_name_a_model_by_the_same_digest(self) -> None:
        resource = ensemble()
        member = resource.spec.members[0]
        sources = {m.name: model_source(m, m) for m in resource.spec.members}
        gateway = gateway_plan(resource, 1, sources, self.tensors, {"cpu-0": "unix:/run/0"})
        row = ensemble_plan(gateway, self.matrix, sources, 0).worker("cpu-0")
        assert row is not None
        assert row.members[0].digest == gateway.members[0].digest
        changed = model_source(member, replace(member, model=replace(member.model, sha256="0" * 64)))
        assert changed.digest != gateway.members[0].digest
        assert changed.sha256 == ""
