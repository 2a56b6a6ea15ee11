"""CURVE keys as files in a folder: a peer's own pair, and the public key that the other side must have.

Workers share one pair and gateways another (a folder is a mounted Secret). Keys are Z85 text of 40 characters
(ZeroMQ RFC 32); a file may end with a newline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

OWN_PUBLIC = "own.public"
OWN_SECRET = "own.secret"  # noqa: S105  # a file's name
PEER_PUBLIC = "peer.public"

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
        for name in (OWN_PUBLIC, OWN_SECRET, PEER_PUBLIC):
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
