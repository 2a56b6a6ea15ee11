"""Amounts as Kubernetes users write them: quantities (`512Mi`, `250m`), Go durations (`1m30s`), percentages (`10%`).

Grammars: Kubernetes, apimachinery `resource.Quantity`; Go, `time.ParseDuration`. Arithmetic is exact until the result.
The patterns are RE2 and Python alike, without anchors, so that the CRD can carry them. Signs are not accepted: nothing
in the resource can be negative.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

NUMBER = r"([0-9]+(\.[0-9]*)?|\.[0-9]+)"
QUANTITY_PATTERN = NUMBER + r"([eE][+-]?[0-9]{1,2}|[KMGTPE]i|[numkMGTPE])?"
DURATION_PATTERN = r"0|(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+"
PERCENTAGE_PATTERN = r"([0-9]{1,2}(\.[0-9]{1,3})?|100)%"
MAX_TEXT = 32
"""Characters of the longest amount: longer ones only cost time to parse."""

MAX_QUANTITY = (1 << 63) - 1
MAX_DURATION_NS = (1 << 63) - 1

_SCALES: dict[str, Fraction] = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
    "Ki": Fraction(1 << 10),
    "Mi": Fraction(1 << 20),
    "Gi": Fraction(1 << 30),
    "Ti": Fraction(1 << 40),
    "Pi": Fraction(1 << 50),
    "Ei": Fraction(1 << 60),
}
_NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}

_QUANTITY = re.compile(r"(?P<number>" + NUMBER + r")(?P<suffix>[eE][+-]?[0-9]{1,2}|[KMGTPE]i|[numkMGTPE])?")
_DURATION = re.compile(DURATION_PATTERN)
_DURATION_PART = re.compile(r"(?P<number>[0-9]*\.?[0-9]*)(?P<unit>ns|us|µs|μs|ms|s|m|h)")
_PERCENTAGE = re.compile(PERCENTAGE_PATTERN)


def parse_quantity(text: str) -> Fraction:
    """The exact value of a Kubernetes quantity.

    Raises ValueError if it is malformed, negative or above 2**63 - 1.
    """
    match = _QUANTITY.fullmatch(text) if len(text) <= MAX_TEXT else None
    if match is None:
        raise ValueError("must be a quantity like 512Mi, 2G or 250m")
    suffix = match["suffix"] or ""
    scale = _SCALES[suffix] if suffix in _SCALES else Fraction(10) ** int(suffix[1:])
    value = _decimal(match["number"]) * scale
    if value > MAX_QUANTITY:
        raise ValueError("must be at most 8Ei")
    return value


def parse_bytes(text: str) -> int:
    """Bytes of a quantity, rounded up to a whole byte. Raises ValueError as `parse_quantity` does."""
    return math.ceil(parse_quantity(text))


def parse_cores(text: str) -> float:
    """CPU cores of a quantity, rounded up to a thousandth. Raises ValueError as `parse_quantity` does."""
    return math.ceil(parse_quantity(text) * 1000) / 1000


def parse_duration_s(text: str) -> float:
    """Seconds of a Go duration: whole nanoseconds, like Go's.

    Raises ValueError if it is malformed, negative, lacks a unit or is above 2**63 - 1 ns (292 years).
    """
    if len(text) > MAX_TEXT or not _DURATION.fullmatch(text):
        raise ValueError("must be a duration like 30s, 1m30s or 5ms")
    parts = _DURATION_PART.finditer(text)
    nanoseconds = sum(math.floor(_decimal(part["number"]) * _NANOSECONDS[part["unit"]]) for part in parts)
    if nanoseconds > MAX_DURATION_NS:
        raise ValueError("must be at most 2562047h")
    return nanoseconds / 10**9


def parse_percentage(text: str) -> float:
    """The fraction, 0..1, of a percentage with at most three decimals. Raises ValueError if it is not one."""
    if not _PERCENTAGE.fullmatch(text):
        raise ValueError("must be a percentage like 10%, from 0% to 100%")
    return float(_decimal(text[:-1]) / 100)


def _decimal(number: str) -> Fraction:
    """Of digits with at most one point, on either side of which they may be missing ("5.", ".5")."""
    whole, _, decimals = number.partition(".")
    return Fraction(int(whole + decimals), 10 ** len(decimals))
