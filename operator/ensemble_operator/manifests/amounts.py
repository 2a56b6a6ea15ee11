"""Numbers as Kubernetes quantities, in the form in which the API server returns them."""

from __future__ import annotations

import math

_BINARY = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki")


def bytes_quantity(count: int) -> str:
    """Bytes with the largest binary suffix that needs no fraction: 805306368 is `768Mi`."""
    for power, suffix in zip(range(len(_BINARY), 0, -1), _BINARY, strict=True):
        if count and count % (1 << 10 * power) == 0:
            return f"{count >> 10 * power}{suffix}"
    return str(count)


def cores_quantity(cores: float) -> str:
    """CPU cores, in thousandths where they are no whole number: 0.5 is `500m`."""
    thousandths = math.ceil(round(cores * 1000, 6))
    return f"{thousandths // 1000}" if thousandths % 1000 == 0 else f"{thousandths}m"
