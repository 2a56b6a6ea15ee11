"""The runner's socket: where it lies, who may connect, and what becomes of one that a killed runner left."""

import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ensemble_operator.addresses import AddressUnavailable
from ensemble_operator.serve.control_socket import MAX_PATH_BYTES, listening, socket_path


@pytest.fixture
def base() -> Iterator[Path]:
    """A short folder: pytest's own names are too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_it_lies_in_the_runtime_folder_where_there_is_one(base: Path) -> None:
    assert socket_path("trio", str(base)) == base / "ensemble-operator" / "trio.sock"
    for unusable in (None, "", "/does/not/exist", str(base / ("x" * 100))):
        path = socket_path("trio", unusable)
        assert path.name == "trio.sock"
        assert path.is_relative_to(tempfile.gettempdir())
    long = base / ("x" * 80)
    long.mkdir()
    assert len(bytes(socket_path("a" * 20, str(long)))) <= MAX_PATH_BYTES


def test_only_this_user_may_connect_and_it_is_gone_at_the_end(base: Path) -> None:
    path = socket_path("trio", str(base))
    with listening(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert connects(path)
    assert list(base.iterdir()) == []


def test_one_that_nobody_listens_on_is_replaced_and_a_living_one_is_not(base: Path) -> None:
    path = base / "trio.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert not connects(path)
    with listening(path):
        with pytest.raises(AddressUnavailable, match="another server listens there"), listening(path):
            pass
        assert connects(path)


def test_a_successor_s_socket_is_left_alone(base: Path) -> None:
    path = base / "trio.sock"
    with listening(path):
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
    assert path.exists()
    other.close()
    with listening(base / "own" / "trio.sock"):
        pass
    assert (base / "own").is_dir(), "a folder of the user's choice is the user's"


def test_a_folder_that_others_may_write_to_is_refused(base: Path) -> None:
    folder = base / "ensemble-operator"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(AddressUnavailable, match="not this user's alone"), listening(folder / "trio.sock"):
        pass


@pytest.mark.parametrize("name", ["no/such/folder/" + "x" * 200, "file/trio.sock"])
def test_where_no_socket_can_be_is_said(base: Path, name: str) -> None:
    (base / "file").write_text("")
    with pytest.raises(AddressUnavailable, match="no socket can be there"), listening(base / name):
        pass
