"""How many pods, and when devices are given back."""

from __future__ import annotations

import pytest

from ensemble_operator.control.acquire import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Patience,
    Waiting,
    patience,
    pause_s,
    replicas,
)

LACKING = Waiting(fits=False, lacking=True)
FITTING = Waiting(fits=True, lacking=True)
MEASURING = Waiting(fits=False, lacking=False)


@pytest.mark.parametrize(
    ("wanted", "present", "in_use", "released", "expected"),
    [
        (4, None, -1, False, 4),  # new
        (4, 2, 1, False, 4),  # more: at once
        (2, 4, 3, False, 4),  # fewer, and the last still serves
        (2, 4, 2, False, 3),  # the third still serves
        (2, 4, 1, False, 2),  # all moved away
        (2, 4, -1, False, 2),  # nothing runs
        (4, 4, 3, True, 0),  # given back
    ],
)
def test_replicas(wanted: int, present: int | None, in_use: int, released: bool, expected: int) -> None:
    assert replicas(wanted, present, in_use, released=released) == expected


def test_who_waits_too_long_gives_back_waits_and_tries_again() -> None:
    now = 1_000.0
    state = patience(Patience(), LACKING, 600, now, "ns/a", 1)
    assert state == Patience(waiting_since=now)
    assert patience(state, LACKING, 600, now + 600, "ns/a", 1) == state
    released = patience(state, LACKING, 600, now + 601, "ns/a", 1)
    assert released.waiting_since is None
    assert (released.attempts, released.generation) == (1, 1)
    assert released.retry_at is not None
    assert 0.5 * FIRST_PAUSE_S <= released.retry_at - (now + 601) <= 1.5 * FIRST_PAUSE_S
    assert patience(released, LACKING, 600, released.retry_at - 1, "ns/a", 1) == released
    again = patience(released, LACKING, 600, released.retry_at + 1, "ns/a", 1)
    assert again == Patience(waiting_since=released.retry_at + 1, attempts=1)


def test_who_has_corrected_the_resource_does_not_wait() -> None:
    released = Patience(retry_at=5_000.0, attempts=3, generation=1)
    assert patience(released, LACKING, 600, 1_000.0, "ns/a", 1) == released
    assert patience(released, LACKING, 600, 1_000.0, "ns/a", 2) == Patience(waiting_since=1_000.0)
    unknown = Patience(retry_at=5_000.0, attempts=3)
    assert patience(unknown, LACKING, 600, 1_000.0, "ns/a", 2) == unknown


def test_who_fits_does_not_wait_whatever_is_lacking() -> None:
    assert patience(Patience(waiting_since=1.0, attempts=3), FITTING, 10, 1e6, "ns/a", 1) == Patience()


def test_measuring_is_no_waiting() -> None:
    state = patience(Patience(waiting_since=1.0, attempts=2), MEASURING, 10, 1e6, "ns/a", 1)
    assert state == Patience(attempts=2)


def test_two_that_hold_half_each_come_back_at_different_times() -> None:
    pauses = {round(pause_s(0, f"ns/{name}"), 1) for name in "abcdefgh"}
    assert len(pauses) == 8
    assert max(pause_s(n, "ns/a") for n in range(60)) <= 1.5 * LONGEST_PAUSE_S


def test_patience_outlives_the_operator() -> None:
    state = Patience(waiting_since=1_700_000_000.0, retry_at=1_700_000_060.0, attempts=4, generation=7)
    assert Patience.read(state.annotations()) == state
    assert Patience.read({}) == Patience()
    damaged = dict.fromkeys(state.annotations(), "soon")
    assert Patience.read(damaged) == Patience()
