"""What `ensemble serve` says: results to standard output, the rest to standard error; a live table on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from ensemble_operator.tables import LiveView, live_table, one_line

LOG_EVERY_S = 30.0
# Where no terminal says how wide it is: logs have no edge to wrap at.
PLAIN_WIDTH = 160


class Screen:
    """One place that writes, so that log lines and the live table do not tear each other."""

    def __init__(self) -> None:
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)
        self._live: Live | None = None
        self._logged_at = time.monotonic()
        self._logged_requests = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hide()

    def note(self, text: str) -> None:
        """A step, said while it is taken."""
        self._say(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        """Something that a person should know."""
        self._say(Text(f"warning: {text}", style="yellow"))

    def wrote(self, name: str, line: str) -> None:
        """A line that a child process wrote; its log lines have its name already."""
        self._say(Text(line if name in line else f"{name}: {line}"))

    def result(self, *parts: RenderableType) -> None:
        """What the user asked for, to standard output."""
        for part in parts:
            self._out.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)
        self._out.file.flush()

    def show(self, view: LiveView) -> None:
        """The state now: the live table on a terminal; elsewhere a log line, every 30 s, after traffic."""
        if self._out.is_terminal:
            if self._live is None:
                self._live = Live(console=self._out, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(live_table(view), refresh=True)
            return
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S and view.requests != self._logged_requests:
            self._logged_at, self._logged_requests = now, view.requests
            self.note(one_line(view))

    def hide(self) -> None:
        """Take the live table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, text: Text) -> None:
        # Above the live table, on the console that draws it: another one would write into the table.
        console = self._err if self._live is None else self._out
        console.print(text, soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
