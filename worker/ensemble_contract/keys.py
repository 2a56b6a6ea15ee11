"""What a process proves itself by, as files in a folder (a mounted Secret): CURVE keys and the admin API's token.

Workers share one pair of keys and gateways another; each side has its own pair and the public key that the other must
have. Keys are Z85 text of 40 characters (ZeroMQ RFC 32); a file may end with a newline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ensemble_contract.pod import TOKEN_FILE
from ensemble_contract.stamps import Stamp, file_stamp

OWN_PUBLIC = "own.public"
OWN_SECRET = "own.secret"  # noqa: S105  # a file's name
PEER_PUBLIC = "peer.public"
KEY_FILES = (OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC)

_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """What a folder of keys holds."""

    own_public: bytes
    own_secret: bytes = field(repr=False)
    peer_public: bytes

    @staticmethod
    def read(folder: Path) -> KeyFiles:
        """Read the three files.

        Raises ValueError naming the file that is missing, unreadable or not a key.
        """
        found = []
        for name in KEY_FILES:
            try:
                key = (folder / name).read_bytes().strip()
            except OSError as error:
                raise ValueError(f"{folder / name}: {error.strerror}") from error
            if not _Z85.fullmatch(key):
                raise ValueError(
                    f"{folder / name}: not a key of 40 characters of Z85, but {len(key)} bytes of something else"
                )
            found.append(key)
        return KeyFiles(*found)

    def write(self, folder: Path) -> None:
        """Write the three files, readable by their owner only."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, key in (
            (OWN_PUBLIC, self.own_public),
            (OWN_SECRET, self.own_secret),
            (PEER_PUBLIC, self.peer_public),
        ):
            path = folder / name
            path.touch(mode=0o600)
            path.write_bytes(key + b"\n")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a folder has for a process: `keys` None means links without encryption, an empty `token` an open admin API.

    A folder of keys may have no token; one without keys must have it, so that a folder that was not mounted is no
    choice.
    """

    keys: KeyFiles | None = None
    token: str = field(default="", repr=False)

    @staticmethod
    def read(folder: Path) -> Credentials:
        """Read the folder.

        Raises ValueError naming the file that is missing, unreadable or not what it should be.
        """
        token = _read_token(folder / TOKEN_FILE)
        if token and not any((folder / name).exists() for name in KEY_FILES):
            return Credentials(None, token)
        return Credentials(KeyFiles.read(folder), token)


def stamp_of(folder: Path) -> tuple[Stamp | None, ...]:
    """Something that differs when a file of the folder was replaced."""
    return tuple(file_stamp(folder / name) for name in (*KEY_FILES, TOKEN_FILE))


def _read_token(path: Path) -> str:
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not text or not text.isascii():
        raise ValueError(f"{path}: not a token, which is a line of ASCII")
    return text
