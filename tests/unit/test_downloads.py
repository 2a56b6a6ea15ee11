"""How downloads are shown: lines now and then where there is no terminal, bars where there is one."""

from __future__ import annotations

import io

from rich.console import Console

from ensemble_operator.profiles.measurements import Download, download_of
from ensemble_operator.serve.downloads import Downloads

MIB = 1 << 20


def test_lines_every_few_seconds_and_one_at_the_end() -> None:
    now = 0.0
    lines: list[str] = []
    with Downloads(lines.append, Console(file=io.StringIO()), lambda: now) as downloads:
        for step in range(13):
            now = float(step)
            downloads.advance("cat", Download(step * MIB, 12 * MIB))
        downloads.advance("dog", Download(3 * MIB))
        now = 20.0
        downloads.advance("dog", Download(4 * MIB))
        downloads.note("something else")
    assert lines == [
        "cat: downloaded 5.0 MiB of 12.0 MiB (41 %)",
        "cat: downloaded 10.0 MiB of 12.0 MiB (83 %)",
        "cat: downloaded 12.0 MiB of 12.0 MiB (100 %)",
        "dog: downloaded 4.0 MiB",
        "something else",
    ]


def test_bars_on_a_terminal_with_other_lines_above_them() -> None:
    screen = io.StringIO()
    lines: list[str] = []
    console = Console(file=screen, force_terminal=True, width=120)
    with Downloads(lines.append, console) as downloads:
        downloads.note("before")
        downloads.advance("cat", Download(6 * MIB, 12 * MIB))
        downloads.note("meanwhile [x]")
        downloads.advance("cat", Download(12 * MIB, 12 * MIB))
    assert lines == ["before"]
    shown = screen.getvalue()
    assert "downloading cat" in shown
    assert "12.0/12.0 MiB" in shown
    assert "meanwhile [x]" in shown


def test_only_lines_about_a_download_are_taken_for_one() -> None:
    assert download_of('{"downloadedBytes": 5, "totalBytes": null}') == Download(5)
    assert download_of('{"downloadedBytes": 5, "totalBytes": 9}') == Download(5, 9)
    for line in ('{"batchSize": 1}', '{"error": "no"}', "", "Killed", "[]"):
        assert download_of(line) is None
