"""The restart rule, as a table of histories and what follows."""

import itertools

import pytest

from ensemble_operator.exits import ExitCode, describe
from ensemble_operator.restarts import History, Life, restart_delay


def lives(*of: tuple[float, int, bool]) -> History:
    """A history of (seconds alive, exit code, was ready), one after another, the last ending at 1000."""
    start = 1000.0 - sum(alive for alive, _, _ in of)
    history = History()
    for alive, code, ready in of:
        history = history.after(Life(start, start + alive, code, ready))
        start += alive
    return history


CRASH = (1.0, -11, True)
STILLBORN = (0.1, 1, False)
LONG = (60.0, -9, True)

TABLE = [
    ("first start", History(), 0.0),
    ("first crash", lives(CRASH), 0.2),
    ("second", lives(CRASH, CRASH), 0.4),
    ("third", lives(CRASH, CRASH, CRASH), 0.8),
    ("sixth", lives(*[CRASH] * 6), 6.4),
    ("seventh: the longest", lives(*[CRASH] * 7), 10.0),
    ("hundredth: still tried", lives(*[CRASH] * 100), 10.0),
    ("a long life resets", lives(*[CRASH] * 9, LONG), 0.2),
    ("and counts from there", lives(*[CRASH] * 9, LONG, CRASH, CRASH), 0.4),
    ("just too short to reset", lives(CRASH, (59.9, 1, True)), 0.4),
    ("never ready, 4 lives", lives(*[STILLBORN] * 4), 1.6),
    ("never ready, 5 lives: give up", lives(*[STILLBORN] * 5), None),
    ("never ready but long lives: give up too", lives(*[(90.0, 1, False)] * 5), None),
    ("ready once: never given up", lives(CRASH, *[STILLBORN] * 50), 10.0),
    ("usage: useless to repeat", lives((0.1, ExitCode.USAGE, False)), None),
    ("address in use: useless to repeat", lives((0.1, ExitCode.ADDRESS_UNAVAILABLE, False)), None),
    ("address in use after it had served: may pass", lives(CRASH, (0.1, ExitCode.ADDRESS_UNAVAILABLE, False)), 0.4),
    ("a clean exit nobody asked for", lives((5.0, 0, True)), 0.2),
]


@pytest.mark.parametrize(("history", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_delay(history: History, expected: float | None) -> None:
    assert restart_delay(history, now=1000.0) == (None if expected is None else pytest.approx(expected))


def test_time_that_has_passed_counts() -> None:
    assert restart_delay(lives(*[CRASH] * 7), now=1004.0) == pytest.approx(6.0)
    assert restart_delay(lives(*[CRASH] * 7), now=2000.0) == 0.0


def test_history_is_bounded_but_remembers_readiness_and_count() -> None:
    history = lives(CRASH)
    for _ in itertools.repeat(None, 10_000):
        history = history.after(Life(0.0, 1.0, 1, was_ready=False))
    assert len(history.lives) == 16
    assert history.count == 10_001
    assert restart_delay(history, now=1.0) == 10.0


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (6, "ended with exit code 6"),
        (-11, "was ended by SIGSEGV"),
        (-9, "was ended by SIGKILL (out of memory?)"),
        (-90, "was ended by signal 90"),
    ],
)
def test_describe(code: int, text: str) -> None:
    assert describe(code) == text
