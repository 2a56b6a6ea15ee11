"""How downloads of models go on, while members are measured: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from ensemble_operator.profiles.measurements import Download

LINE_EVERY_S = 5.0
MIB = 1 << 20


class Downloads:
    """Shows downloads on standard error. While bars are shown, other lines must go through `note`, above them."""

    def __init__(
        self,
        note: Callable[[str], None],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note = note
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._said_at: dict[str, float] = {}
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, text: str) -> None:
        """A line about something else."""
        if self._bars is None:
            self._note(text)
        else:
            self._bars.console.print(Text(text, style="dim"), soft_wrap=True)

    def advance(self, member: str, download: Download) -> None:
        """A member's download is so far."""
        if self._console.is_terminal:
            self._draw(member, download)
            return
        now, done = self._clock(), download.downloaded_bytes == download.total_bytes
        if done or now - self._said_at.setdefault(member, now) >= LINE_EVERY_S:
            self._said_at[member] = now
            self._note(line(member, download))

    def _draw(self, member: str, download: Download) -> None:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        if member not in self._tasks:
            self._tasks[member] = self._bars.add_task(f"downloading {member}", total=download.total_bytes)
        self._bars.update(self._tasks[member], completed=download.downloaded_bytes, total=download.total_bytes)


def line(member: str, download: Download) -> str:
    """A download in words."""
    done, total = download.downloaded_bytes, download.total_bytes
    share = f" of {total / MIB:.1f} MiB ({100 * done // max(1, total)} %)" if total is not None else ""
    return f"{member}: downloaded {done / MIB:.1f} MiB{share}"
