"""How far a long command has come: a progress bar on a terminal, lines elsewhere. Writes to standard error only."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ensemble_operator.serve.live import PLAIN_WIDTH

LINE_EVERY_S = 5.0


def screen_width() -> int:
    """Characters of a line of standard output, as results are written there."""
    console = Console()
    return console.width if console.is_terminal else PLAIN_WIDTH


class Bar:
    """A bar from 0 to `total`, while the block lasts; `total` is in any unit."""

    def __init__(self, total: float, text: str) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total
        self._said_at = time.monotonic()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def at(self, done: float, text: str) -> None:
        """Where it is now; elsewhere than on a terminal a line at most every 5 s."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done, description=text)
            return
        now = time.monotonic()
        if now - self._said_at >= LINE_EVERY_S:
            self._said_at = now
            self.note(f"{min(1.0, done / self._total):.0%}: {text}")
