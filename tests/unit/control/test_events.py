"""Events: once, then counted up; cut to what the API takes; forgotten after a while."""

from __future__ import annotations

from typing import Any

from ensemble_operator.control.events import MAX_NOTE_BYTES, MAX_REMEMBERED, SERIES_S, EventMemory, Happening

ENSEMBLE: dict[str, Any] = {
    "apiVersion": "ensemble-operator.io/v1alpha1",
    "kind": "InferenceEnsemble",
    "metadata": {"name": "e", "namespace": "ns", "uid": "u"},
}


def happening(note: str = "2 devices held") -> Happening:
    return Happening.about(ENSEMBLE, "Normal", "DevicesAcquired", note, "Acquire")


def test_the_same_again_is_counted() -> None:
    memory = EventMemory("pod-1")
    assert memory.again(happening(), 0) is None
    first = memory.first(happening(), 1_700_000_000)
    memory.remember(happening(), first["metadata"]["name"], 1_700_000_000)
    again = memory.again(happening(), 1_700_000_001)
    assert again == (
        first["metadata"]["name"],
        {"series": {"count": 2, "lastObservedTime": "2023-11-14T22:13:21.000000Z"}},
    )
    more = memory.again(happening(), 1_700_000_002)
    assert more is not None
    assert more[1]["series"]["count"] == 3
    assert memory.again(happening("3 devices held"), 1_700_000_002) is None


def test_a_series_ends_after_a_silence() -> None:
    memory = EventMemory("pod-1")
    memory.remember(happening(), "e.1", 0)
    assert memory.again(happening(), SERIES_S + 1) is None


def test_two_events_of_one_kind_have_different_names() -> None:
    memory = EventMemory("pod-1")
    names = {memory.first(happening(note), now)["metadata"]["name"] for note in "ab" for now in (1, 2)}
    assert len(names) == 4


def test_a_long_note_is_cut_between_characters() -> None:
    note = happening("é" * 1_000).note
    assert len(note.encode()) <= MAX_NOTE_BYTES
    assert note.endswith("é…")


def test_memory_is_bounded() -> None:
    memory = EventMemory("pod-1")
    for number in range(MAX_REMEMBERED + 10):
        memory.remember(happening(str(number)), f"e.{number}", 0)
    assert memory.again(happening("0"), 1) is None
    assert memory.again(happening(str(MAX_REMEMBERED)), 1) is not None
