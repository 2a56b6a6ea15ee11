"""Logs: one line a record, as JSON or as text, with the ensemble that it is about."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

# The ensemble that this task is about, as NAMESPACE/NAME; inherited by the tasks that it starts.
current_ensemble: contextvars.ContextVar[str] = contextvars.ContextVar("current_ensemble", default="")

# What kopf says whenever it is not in the main thread, which is where we want it; and each time that it asks a server
# that is away, which the watches tell once.
_EXPECTED = ("OS signals are ignored", "Request attempt #")


class _AboutEnsemble(logging.Filter):
    """Gives each record the ensemble of the task that wrote it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.ensemble = current_ensemble.get()
        return not (record.name.startswith("kopf") and record.getMessage().startswith(_EXPECTED))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, ensemble, message, and error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "ensemble": getattr(record, "ensemble", ""),
            "message": record.getMessage(),
            "error": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: text for name, text in line.items() if text}, ensure_ascii=False)


class TextLines(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        about = getattr(record, "ensemble", "")
        stamp = self.formatTime(record, "%H:%M:%S")
        line = f"{stamp} {record.levelname.lower():7} {f'[{about}] ' if about else ''}{record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(form: str, level: str, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (default: stderr)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    handler.addFilter(_AboutEnsemble())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # What it says at INFO is about its own machinery, and its errors are told by those who run it.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
