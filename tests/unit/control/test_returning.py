"""Which workers are waited for: those that come back, where others answer for every member meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from ensemble_contract.plan import EnsemblePlan
from ensemble_operator.control.book import Book
from ensemble_operator.control.observe import WorkerView
from ensemble_operator.control.planning import members_to_serve, question, target_of, tensors_of, wanted_sources
from ensemble_operator.control.profiling import measured
from ensemble_operator.control.questions import PlanAnswer
from ensemble_operator.control.returning import returning
from ensemble_operator.control.stepping import goal_of
from ensemble_operator.control.target import Mirror, Target, TargetDevice
from tests.unit.control.ensembles import CLASS, MIB, ensemble, observed, pod, profiled, worker

TWO = ensemble(members=[profiled("a"), profiled("b")])
SOURCES = wanted_sources(TWO)
NAMES = ("tiny-worker-0", "tiny-worker-1")
DEVICES = dict.fromkeys(NAMES, TargetDevice(CLASS, "cpu", 1024 * MIB, 700 * MIB))


def mirror(*cells: tuple[str, str]) -> Mirror:
    """A plan with instances of batch size 1 at (worker, member)."""
    members = members_to_serve(TWO, {}, None)
    asked = question(TWO, members, DEVICES, measured(TWO, members.sources, [CLASS], Book(), 0.0), ())
    target: Target = target_of(asked, PlanAnswer(tuple((w, m, 1) for w, m in cells), 1, 1, "", 0), DEVICES, None)
    addresses = {name: f"tcp://{name}:1" for name in NAMES}
    plan: EnsemblePlan = goal_of(TWO, members, tensors_of(TWO, members.sources, Book()), target, addresses, 0)
    return Mirror(msgspec.structs.replace(plan, gateway=msgspec.structs.replace(plan.gateway, generation=1)), target)


def running(name: str, members: str, state: str = "ready", **changes: object) -> WorkerView:
    return worker(name, *((m, SOURCES[m].digest, 1, state) for m in members), pod=pod(name, **changes))


BOTH = mirror(*((name, member) for name in NAMES for member in "ab"))
LEAVING = running(NAMES[0], "ab", leaving_since=10.0)


@pytest.mark.parametrize("first", [(), (LEAVING,)])
def test_a_pod_that_is_deleted_or_gone_is_made_again(first: Iterable[WorkerView]) -> None:
    assert returning(TWO, observed([*first, running(NAMES[1], "ab")], mirror=BOTH)) == (NAMES[0],)


@pytest.mark.parametrize(
    "second", [running(NAMES[1], "a"), running(NAMES[1], "ab", "loading"), running(NAMES[1], "ab", leaving_since=1.0)]
)
def test_nobody_is_waited_for_while_a_member_has_no_other_instance(second: WorkerView) -> None:
    assert returning(TWO, observed([LEAVING, second], mirror=BOTH)) == ()


def test_only_who_has_a_part_and_is_wanted_comes_back() -> None:
    idle = mirror((NAMES[1], "a"), (NAMES[1], "b"))
    assert returning(TWO, observed([running(NAMES[1], "ab")], mirror=idle)) == ()
    one = ensemble(
        members=[profiled("a"), profiled("b")], devices={"count": 1, "resource": "cpu", "cores": "1", "memory": "1Gi"}
    )
    here = running(NAMES[0], "ab")
    assert returning(one, observed([here], mirror=BOTH)) == ()
    assert returning(TWO, observed([here, running(NAMES[1], "ab")], mirror=BOTH)) == ()
    assert returning(TWO, observed([here])) == ()
