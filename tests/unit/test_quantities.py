"""Amounts as Kubernetes users write them, against what Kubernetes and Go document, and against exact arithmetic."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_operator.quantities import parse_bytes, parse_cores, parse_duration_s, parse_percentage, parse_quantity


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512Mi", 512 << 20),
        ("1Gi", 1 << 30),
        ("1.5Gi", 3 << 29),
        ("2G", 2 * 10**9),
        ("1k", 1000),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("12e-1", 2),
        ("100m", 1),
        ("1n", 1),
        (".5Ki", 512),
        ("5.", 5),
        ("7Ei", 7 << 60),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("250m", 0.25), ("2", 2.0), ("0.5", 0.5), ("1500m", 1.5), ("1u", 0.001)])
def test_cores_are_rounded_up_to_a_thousandth(text: str, value: float) -> None:
    assert parse_cores(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Mi",
        ".",
        "-1",
        "+1",
        "1 Gi",
        "1KB",
        "1ki",
        "1K",
        "1gi",
        "0x10",
        "1e",
        "1e999",
        "1e99",
        "8Ei",
        "\u0661",
        "1Gi\n",
        "1" * 40,
    ],
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_quantity(text)


@given(
    st.integers(0, 10**9),
    st.integers(0, 999),
    st.sampled_from([("", 1), ("k", 10**3), ("Mi", 2**20), ("m", Decimal("0.001"))]),
)
def test_quantities_are_exact(whole: int, thousandths: int, suffix: tuple[str, Decimal | int]) -> None:
    text, scale = suffix
    value = parse_quantity(f"{whole}.{thousandths:03}{text}")
    assert value == (Decimal(whole) + Decimal(thousandths) / 1000) * scale


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("1m30s", 90),
        ("0ms", 0),
        ("0", 0),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("5ms", 0.005),
        ("10us", 1e-5),
        ("10µs", 1e-5),
        ("10μs", 1e-5),
        ("1h1m1s1ms1us1ns", 3661.001001001),
        ("1.5ns", 1e-9),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "s", "-1s", "+1s", "1 s", "1d", "1S", ".s", "1m30", "1s\n", "9999999h", "1e3s", "0" * 40 + "s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_duration_s(text)


@given(st.integers(0, 9_000), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_durations_add_up(hours: int, minutes: int, seconds: int, milliseconds: int) -> None:
    total_ms = ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds
    assert parse_duration_s(f"{hours}h{minutes}m{seconds}s{milliseconds}ms") == total_ms / 1000


@pytest.mark.parametrize(
    ("text", "fraction"), [("10%", 0.1), ("0%", 0), ("100%", 1), ("12.5%", 0.125), ("0.125%", 0.00125)]
)
def test_percentages(text: str, fraction: float) -> None:
    assert parse_percentage(text) == fraction


@pytest.mark.parametrize("text", ["", "%", "10", "101%", "-1%", "10 %", "1e1%", ".5%", "10%\n", "NaN%"])
def test_what_is_no_percentage(text: str) -> None:
    with pytest.raises(ValueError, match="must be a percentage"):
        parse_percentage(text)
