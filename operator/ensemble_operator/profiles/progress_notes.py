"""What is said while members are measured."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_operator.bar import Bar
from ensemble_operator.profiles.measurements import Download, Measurement
from ensemble_operator.serve.downloads import line


class MemberProgress:
    """Says what is measured and what came of it, and moves the bar. `total` is members times classes of device."""

    def __init__(self, bar: Bar, sizes: Sequence[int], total: int) -> None:
        self._bar, self._sizes, self._total, self._done = bar, sizes, total, 0
        self.measured = 0

    def report(self, text: str) -> None:
        """A line of the measuring: what it begins, what a child process has written."""
        self.measured += text.startswith("measuring ")
        self._bar.note(text)

    def downloading(self, member: str, download: Download) -> None:
        """A member's model is on its way."""
        self._bar.at(self._done, line(member, download))

    def finished(self, member: str, device_class: str, found: Measurement) -> None:
        """A member is done on a class."""
        self._done += 1
        self._bar.at(self._done, f"{self._done} of {self._total} profiles")
        if found.error:
            self._bar.note(f"{member} on {device_class}: {found.error}")
        elif missing := [s for s in self._sizes if s not in {p.batch_size for p in found.points}]:
            left = ", ".join(map(str, missing))
            self._bar.note(f"{member} on {device_class}: not measured, for want of time or of hope for more: {left}")
