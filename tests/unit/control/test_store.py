"""The store: what matters wakes an ensemble, what is older never replaces what is newer, what went stays gone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ensemble_operator.control.kinds import (
    CONFIG_MAP,
    DISRUPTION_BUDGET,
    ENSEMBLE,
    ENSEMBLE_LABEL,
    POD,
    SECRET,
    STATEFUL_SET,
    Key,
    Kind,
)
from ensemble_operator.control.store import Store

KEY = Key("ns", "e")


def thing(kind: Kind, name: str, version: int, *, uid: str = "", of: str = "e", **parts: Any) -> dict[str, Any]:
    labels = {ENSEMBLE_LABEL: of} if kind != ENSEMBLE else {}
    metadata = {"namespace": "ns", "name": name, "uid": uid or name, "resourceVersion": str(version), "labels": labels}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **parts}


def changed(found: dict[str, Any], version: int, **parts: Any) -> dict[str, Any]:
    other = copy.deepcopy(found) | parts
    other["metadata"]["resourceVersion"] = str(version)
    return other


def test_children_by_ensemble_kind_and_name() -> None:
    store = Store()
    assert store.note(thing(POD, "e-worker-1", 2)) == KEY
    assert store.note(thing(POD, "e-worker-0", 1)) == KEY
    assert store.note(thing(CONFIG_MAP, "e-plan", 3)) == KEY
    assert store.note(thing(POD, "f-worker-0", 4, of="f")) == Key("ns", "f")
    assert [pod["metadata"]["name"] for pod in store.children(POD, KEY)] == ["e-worker-0", "e-worker-1"]
    plan = store.child(CONFIG_MAP, KEY, "e-plan")
    assert plan is not None
    assert store.child(CONFIG_MAP, KEY, "f-plan") is None
    assert store.children(STATEFUL_SET, Key("other", "e")) == []


def test_a_child_that_gets_another_owner_moves() -> None:
    store = Store()
    store.note(thing(POD, "p", 1))
    store.note(thing(POD, "p", 2, of="f"))
    assert store.children(POD, KEY) == []
    assert len(store.children(POD, Key("ns", "f"))) == 1


def test_older_never_replaces_newer() -> None:
    store = Store()
    store.note(thing(CONFIG_MAP, "c", 9, data={"a": "new"}))
    assert store.note(thing(CONFIG_MAP, "c", 8, data={"a": "old"})) is None
    found = store.child(CONFIG_MAP, KEY, "c")
    assert found is not None
    assert found["data"] == {"a": "new"}


def test_what_went_is_not_brought_back_by_a_late_answer() -> None:
    store = Store()
    pod = thing(POD, "p", 5, uid="u1")
    store.note(pod)
    assert store.remove(changed(pod, 7)) == KEY
    assert store.note(changed(pod, 6)) is None
    assert store.children(POD, KEY) == []
    assert store.note(thing(POD, "p", 8, uid="u2")) == KEY


def test_the_removal_of_a_former_object_of_the_name_changes_nothing() -> None:
    store = Store()
    store.note(thing(POD, "p", 9, uid="new"))
    assert store.remove(thing(POD, "p", 7, uid="old")) is None
    assert len(store.children(POD, KEY)) == 1


POD_STATUS: dict[str, Any] = {
    "phase": "Running",
    "podIP": "10.0.0.1",
    "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": None, "observedGeneration": 1}],
}


@pytest.mark.parametrize(
    ("before", "after", "matters"),
    [
        ({"status": POD_STATUS}, {"status": POD_STATUS}, False),
        ({"status": POD_STATUS}, {"status": POD_STATUS | {"podIP": "10.0.0.2"}}, True),
        (
            {"status": POD_STATUS},
            {"status": POD_STATUS | {"conditions": [{"type": "Ready", "status": "True", "lastProbeTime": "now"}]}},
            False,
        ),
        (
            {"status": POD_STATUS},
            {"status": POD_STATUS | {"conditions": [{"type": "Ready", "status": "False"}]}},
            True,
        ),
        ({"spec": {"nodeName": ""}}, {"spec": {"nodeName": "n"}}, True),
    ],
)
def test_what_matters_of_a_pod(before: dict[str, Any], after: dict[str, Any], matters: bool) -> None:
    store = Store()
    pod = thing(POD, "p", 1, **before)
    store.note(pod)
    assert store.note(changed(pod, 2, **after)) == (KEY if matters else None)


def test_labels_matter_and_the_budgets_status_does_not() -> None:
    store = Store()
    budget = thing(DISRUPTION_BUDGET, "b", 1, status={"currentHealthy": 1})
    store.note(budget)
    assert store.note(changed(budget, 2, status={"currentHealthy": 2})) is None
    labelled = changed(budget, 3)
    labelled["metadata"]["labels"]["x"] = "y"
    assert store.note(labelled) == KEY


def test_an_ensembles_status_is_a_report_and_its_spec_is_not() -> None:
    store = Store()
    ensemble = thing(ENSEMBLE, "e", 1, spec={"a": 1}, status={})
    assert store.note(ensemble) == KEY
    assert store.note(changed(ensemble, 2, status={"phase": "Ready"})) is None
    kept = store.ensemble(KEY)
    assert kept is not None
    assert kept["status"] == {"phase": "Ready"}
    assert store.note(changed(ensemble, 3, spec={"a": 2})) == KEY


def test_a_list_removes_what_is_not_in_it_but_not_what_was_written_after_it() -> None:
    store = Store()
    store.note(thing(POD, "gone", 3))
    store.note(thing(POD, "same", 4))
    store.note(thing(POD, "younger", 12, of="f"))
    touched = store.replace(POD, [thing(POD, "same", 4), thing(POD, "new", 8, of="g")], "10")
    assert touched == {KEY, Key("ns", "g")}
    assert [p["metadata"]["name"] for p in store.children(POD, KEY)] == ["same"]
    assert len(store.children(POD, Key("ns", "f"))) == 1


def test_answers_to_writes_of_what_nobody_follows_are_not_kept() -> None:
    store = Store()
    assert store.note_written(thing(SECRET, "s", 1)) is None
    assert store.count(SECRET) == 0
    store.note_written(thing(CONFIG_MAP, "c", 1))
    assert store.count(CONFIG_MAP) == 1


def test_an_event_that_repeats_our_own_write_wakes_nobody() -> None:
    store = Store()
    plan = thing(CONFIG_MAP, "c", 5, data={"plan.json": "{}"})
    store.note_written(plan)
    assert store.note(copy.deepcopy(plan)) is None


def test_nothing_is_left_of_an_ensemble_that_went() -> None:
    store = Store()
    for version, kind in enumerate((POD, CONFIG_MAP, STATEFUL_SET), 1):
        child = thing(kind, "x", version)
        store.note(child)
        store.remove(changed(child, version + 10))
    assert store._children == {}
