"""How many file descriptors this process may open, and its children from then on."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path


def open_descriptors() -> int:
    """How many this process has; the one that looks is not among them."""
    return len(list(Path("/proc/self/fd").iterdir())) - 1


@contextlib.contextmanager
def soft_limit(count: int) -> Iterator[None]:
    """The soft limit of descriptors, as `ulimit -S -n` sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many more."""
    with contextlib.ExitStack() as filled:
        # The limit is on numbers, of which an open file gets the lowest: first those between others have to be taken.
        newest = -1
        while newest != open_descriptors() - 1:
            newest = filled.enter_context(Path(os.devnull).open("rb")).fileno()
        with soft_limit(newest + 1 + count):
            yield
