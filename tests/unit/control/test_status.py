"""From what was found to conditions, a status and events."""

from __future__ import annotations

from typing import Any

from ensemble_contract.errors import InvalidPlan, PlanTooLarge
from ensemble_operator.api.schema import Findings, Place
from ensemble_operator.api.status import MAX_ROWS, STATUS
from ensemble_operator.control import conditions as c
from ensemble_operator.control import errors
from ensemble_operator.control.conditions import Conditions, treatment_of
from ensemble_operator.control.status import Facts, WorkerRow, events, make_status, plan_changed, same_but_times
from ensemble_operator.control.target import Target
from ensemble_operator.errors import InvalidSpec, Problem

FACTS = Facts(replicas=2, selector="a=b", wanted=2, held=2, members=2, live=2, url="http://tiny")


def found(**said: tuple[bool, str]) -> Conditions:
    conditions = Conditions()
    for type_, (holds, reason) in said.items():
        conditions.say(type_, holds=holds, reason=reason, message=f"because {reason}")
    return conditions


READY = {
    "Accepted": (True, "Accepted"),
    "DevicesAcquired": (True, "DevicesAcquired"),
    "Profiled": (True, "Profiled"),
    "Planned": (True, "Planned"),
    "Ready": (True, "Ready"),
    "Degraded": (False, "AsWanted"),
    "RolloutBlocked": (False, "Done"),
}


def status(
    before: dict[str, Any] | None = None, generation: int = 1, now: float = 1.0, **said: tuple[bool, str]
) -> dict[str, Any]:
    return make_status(before or {}, found(**{**READY, **said}), FACTS, generation, now)


def test_it_is_what_the_resource_declares() -> None:
    findings = Findings()
    rows = tuple(WorkerRow(f"w{n}", "node", "cpu-1", 1, 2, (("a", 1),)) for n in range(70))
    target = Target("q", "q", (("a", "d"),), {"w0": ((0, 1),)}, (), {}, 123456.789, 2e5, "why")
    facts = Facts(2, "a=b", 2, 2, None, target, rows, 17.123456, 2, 1, "http://tiny")
    STATUS.check(make_status({}, found(**READY), facts, 1, 0.0), Place("status", findings))
    assert findings.problems == []
    assert make_status({}, found(**READY), facts, 1, 0.0)["throughput"] == {
        "predicted": 123500.0,
        "bound": 200000.0,
        "measured": 17.12,
    }
    assert MAX_ROWS == 64


def test_times_change_with_the_status_only() -> None:
    first = status(now=1.0)
    later = status(first, now=100.0, Planned=(True, "Better"))
    times = {condition["type"]: condition["lastTransitionTime"] for condition in later["conditions"]}
    assert times["Planned"] == "1970-01-01T00:00:01Z"
    assert same_but_times(first, status(first, now=5.0))
    assert not same_but_times(first, later)
    lost = status(first, now=100.0, Ready=(False, "MembersMissing"))
    assert {c_["type"]: c_["lastTransitionTime"] for c_ in lost["conditions"]}["Ready"] == "1970-01-01T00:01:40Z"


def test_what_was_not_looked_at_is_as_it_was_and_for_which_generation() -> None:
    first = status(generation=1)
    rejected = make_status(first, found(Accepted=(False, "InvalidSpec")), FACTS, 2, 2.0)
    seen = {condition["type"]: condition for condition in rejected["conditions"]}
    assert (seen["Accepted"]["status"], seen["Accepted"]["observedGeneration"]) == ("False", 2)
    assert (seen["Ready"]["status"], seen["Ready"]["observedGeneration"]) == ("True", 1)
    assert rejected["phase"] == "Rejected"
    new = make_status({}, found(Accepted=(False, "InvalidSpec")), FACTS, 1, 2.0)
    assert {condition["status"] for condition in new["conditions"][1:]} == {"Unknown"}


def test_where_nothing_was_observed_what_was_told_before_stays() -> None:
    told = {"allocation": {"generation": 3}, "throughput": {"predicted": 100.0, "bound": 200.0, "measured": 17.0}}
    before = {**status(), **told}
    blind = Facts(replicas=None, selector="a=b", wanted=2, members=2)
    after = make_status(before, found(Accepted=(False, "InvalidSpec")), blind, 2, 1.0)
    for part in ("replicas", "allocation", "throughput", "url", "devices", "members"):
        assert after[part] == before[part]
    assert make_status({}, found(), blind, 1, 0.0)["replicas"] == 0
    assert "allocation" not in make_status(before, found(**READY), FACTS, 2, 1.0)


def test_phases() -> None:
    assert status()["phase"] == "Ready"
    assert status(Degraded=(True, "MemberFailed"))["phase"] == "Degraded"
    loading = (False, "MembersMissing")
    assert status(Ready=loading)["phase"] == "Starting"
    assert status(Ready=loading, Planned=(False, "Waiting"))["phase"] == "Planning"
    assert status(Ready=loading, Planned=(False, "x"), Profiled=(False, "Measuring"))["phase"] == "Profiling"
    early = (False, "x")
    starting = status(Ready=loading, Planned=early, Profiled=early, DevicesAcquired=(False, "Starting"))
    assert starting["phase"] == "Acquiring"
    released = status(Ready=loading, Planned=early, Profiled=early, DevicesAcquired=(False, "AcquireTimeout"))
    assert released["phase"] == "Released"


def test_an_event_for_what_happened_and_none_for_what_lasts() -> None:
    first = status()
    assert [e.reason for e in events({}, first)] == ["DevicesAcquired", "Ready"]
    assert list(events(first, status(first, now=9.0))) == []
    degraded = status(first, Degraded=(True, "MemberFailed"))
    assert [(e.type, e.reason) for e in events(first, degraded)] == [("Warning", "Degraded")]
    assert list(events(degraded, status(degraded, Degraded=(True, "MemberFailed")))) == []
    assert [e.reason for e in events(degraded, status(degraded, Degraded=(True, "WorkerLost")))] == ["Degraded"]
    lost = status(first, Ready=(False, "NoGateway"))
    assert [e.reason for e in events(first, lost)] == ["NotReady"]
    released = status(first, DevicesAcquired=(False, "AcquireTimeout"))
    assert [e.reason for e in events(first, released)] == ["AcquireTimeout"]
    unfitting = status(first, Planned=(False, "DoesNotFit"))
    assert [e.reason for e in events(first, unfitting)] == ["DoesNotFit"]
    measuring = status(first, Profiled=(False, "Measuring"))
    assert list(events(first, measuring)) == []


def test_another_plan_is_told_with_old_and_new_throughput() -> None:
    one = Target("q", "q", (("a", "d"),), {"w0": ((0, 1),)}, (), {}, 100.0, 200.0, "w0 is full")
    two = Target("r", "r", (("a", "d"),), {"w0": ((0, 8),), "w1": ((0, 8),)}, (), {}, 300.0, 400.0, "w1 is full")
    assert plan_changed(one, two).message == (
        "300 rows/s predicted (2 instances on 2 devices), was 100 rows/s; w1 is full"
    )
    assert "was" not in plan_changed(None, one).message


def test_every_error_that_is_an_ensembles_business_has_a_condition() -> None:
    forbidden = errors.Forbidden("patch", "apps", "statefulsets", "default", "no")
    treatment = treatment_of(forbidden)
    assert treatment is not None
    conditions = Conditions()
    conditions.fail(forbidden, treatment)
    assert conditions.said[c.DEGRADED].status == c.TRUE
    assert "patch statefulsets" in conditions.said[c.DEGRADED].message
    invalid = InvalidSpec([Problem("spec.x", "is wrong")])
    assert (treatment_of(invalid) or treatment).condition == c.ACCEPTED
    assert (treatment_of(PlanTooLarge("too large")) or treatment).condition == c.PLANNED
    assert treatment_of(InvalidPlan("of our own making")) is None
    for passing in (errors.Unavailable("away"), errors.Conflict("changed"), errors.LeadershipLost("lost")):
        assert treatment_of(passing) is None
