"""Times as the API writes them (RFC 3339), and back. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def unix_time(text: str | None) -> float:
    """Seconds of an RFC 3339 time of the API; 0 if there is none."""
    if not text:
        return 0.0
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def rfc3339(seconds: float) -> str:
    """A time as the API writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_time(seconds: float) -> str:
    """A time as the API's MicroTime, which leases and events have."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
