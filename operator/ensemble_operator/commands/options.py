"""Options that several commands have, and what they mean."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ensemble_operator.commands.arguments import at_least_one
from ensemble_operator.quantities import parse_duration_s


def add_output(parser: argparse.ArgumentParser, *forms: str) -> None:
    """`-o FORM`; the first form is the default."""
    parser.add_argument("-o", "--output", choices=forms, default=forms[0], help="form of the result (default: table)")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """This machine's devices, and where models and profiles are kept."""
    parser.add_argument(
        "--cpu-devices",
        type=at_least_one,
        metavar="N",
        help="divide the CPU into N devices (default: all GPUs; without any, one device a core, at most 8)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where models and profiles are kept (default: $XDG_CACHE_HOME/ensemble-operator)",
    )


def cache_folder(args: argparse.Namespace) -> Path:
    """Where models and profiles are kept."""
    if args.cache_dir:
        return Path(args.cache_dir).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG Base Directory Specification.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ensemble-operator"


def duration(text: str) -> float:
    """Seconds of a duration above 0, such as 10s or 5m."""
    try:
        seconds = parse_duration_s(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time at all: it must be above 0s")
    return seconds


def duration_or_none(text: str) -> float:
    """Seconds of a duration that may be 0s."""
    return 0.0 if text in ("0", "0s", "0ms") else duration(text)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if 0 < number < float("inf"):
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
