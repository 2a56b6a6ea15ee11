"""Key files: what a mounted Secret holds, and what is said about one that is broken."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from ensemble_contract.keys import OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC, KeyFiles


def keys() -> KeyFiles:
    public, secret = zmq.curve_keypair()
    return KeyFiles(public, secret, zmq.curve_keypair()[0])


def test_round_trip(tmp_path: Path) -> None:
    for written in (keys() for _ in range(50)):
        written.write(tmp_path / "keys")
        assert KeyFiles.read(tmp_path / "keys") == written


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    keys().write(tmp_path / "keys")
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "keys").iterdir()} == {"600"}
    assert oct((tmp_path / "keys").stat().st_mode)[-3:] == "700"


def test_a_secret_is_not_shown() -> None:
    shown = keys()
    assert shown.own_secret.decode() not in repr(shown)


@pytest.mark.parametrize("name", [OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC])
@pytest.mark.parametrize("content", [None, b"", b"x" * 39, b"x" * 41, b"\xff" * 40, b"~" * 40])
def test_a_broken_file_is_named_and_its_content_is_not(tmp_path: Path, name: str, content: bytes | None) -> None:
    keys().write(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as error:
        KeyFiles.read(tmp_path)
    assert "xxxx" not in str(error.value)
