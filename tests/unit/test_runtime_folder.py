"""The private folder: private, short enough for sockets, gone at the end, and swept when a runner was killed."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble_operator.serve.runtime_folder import PREFIX, YOUNG_S, runtime_folder


@pytest.fixture
def base() -> Iterator[Path]:
    """A short folder: pytest's own names are too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def age(folder: Path) -> None:
    then = time.time() - YOUNG_S - 1
    os.utime(folder, (then, then))


def test_private_and_removed_with_all_that_is_in_it(base: Path) -> None:
    with runtime_folder(str(base)) as folder:
        assert folder.parent == base
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "cuda-1023.admin"))
    assert list(base.iterdir()) == []


def test_a_base_that_is_too_long_or_not_there_is_not_used(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for unusable in (str(long), "/does/not/exist", "", None):
        with runtime_folder(unusable) as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "cuda-1023.admin"))
            assert not folder.is_relative_to(long)


def test_the_folder_of_a_killed_runner_is_swept_and_a_living_one_is_not(base: Path) -> None:
    code = (
        "import sys, time\nfrom ensemble_operator.serve.runtime_folder import runtime_folder\n"
        "with runtime_folder(sys.argv[1]) as folder:\n    print(folder, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(base)], stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        theirs = Path(runner.stdout.readline().strip())
        try:
            age(theirs)
            with runtime_folder(str(base)):
                assert theirs.is_dir()
        finally:
            runner.kill()
    assert theirs.is_dir()
    with runtime_folder(str(base)):
        assert not theirs.exists()


def test_what_is_young_or_of_others_is_left_alone(base: Path) -> None:
    young, other = base / f"{PREFIX}young", base / "something"
    young.mkdir()
    other.mkdir()
    age(other)
    with runtime_folder(str(base)):
        assert young.is_dir()
        assert other.is_dir()
