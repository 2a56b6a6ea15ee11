"""What the commands' parsers share. A function that raises ArgumentTypeError gives one clear line and exit code 2."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # argparse has no public name for what `add_subparsers` returns.
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = object


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose."""
    if text.isdecimal() and int(text) <= 65_535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port in 0..65535")


def at_least_one(text: str) -> int:
    """A count."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")


def seed(text: str) -> int:
    """A seed of something random."""
    if text.isdecimal() and int(text) < 1 << 31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 0..{(1 << 31) - 1}")
