"""When a process that ended is started again: a pure rule over its history. The caller owns the clock."""

from __future__ import annotations

from dataclasses import dataclass

from ensemble_operator.exits import ExitCode

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0
PROVEN_AFTER_S = 60.0
MAX_LIVES_UNPROVEN = 5
REMEMBERED_LIVES = 16

# Ends that another start with the same arguments can only repeat.
FINAL_CODES = frozenset({ExitCode.USAGE, ExitCode.INVALID_RESOURCE, ExitCode.ADDRESS_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a process. `code` is negative for a signal; `was_ready` says whether it came to do its work."""

    started_at: float
    ended_at: float
    code: int
    was_ready: bool

    @property
    def alive_s(self) -> float:
        """How long it lived."""
        return self.ended_at - self.started_at


@dataclass(frozen=True, slots=True)
class History:
    """What is remembered of a process: its last lives, oldest first, how many there were, and if one was ever ready."""

    lives: tuple[Life, ...] = ()
    count: int = 0
    ever_ready: bool = False

    def after(self, life: Life) -> History:
        """The history with one more life."""
        return History((*self.lives, life)[-REMEMBERED_LIVES:], self.count + 1, self.ever_ready or life.was_ready)


def restart_delay(history: History, now: float) -> float | None:
    """Seconds from `now` until the next start, or None: give up.

    The pause doubles from 0.2 s to 10 s with every life shorter than 60 s, and starts anew after a longer one. A
    process that has never been ready is given up after five lives, and at once where its exit code says that another
    start is useless. One that has been ready is never given up: what worked may work again, and trying costs little.
    """
    if not history.lives:
        return 0.0
    last = history.lives[-1]
    if not history.ever_ready and (last.code in FINAL_CODES or history.count >= MAX_LIVES_UNPROVEN):
        return None
    short_lives = 0
    for life in reversed(history.lives):
        if life.alive_s >= PROVEN_AFTER_S:
            break
        short_lives += 1
    pause_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, short_lives - 1))
    return max(0.0, last.ended_at + pause_s - now)
