"""Archives of images as `docker save` and buildah write them: how much each layer is, packed and unpacked."""

from __future__ import annotations

import gzip
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# What registries' clients pack layers with, as a rule.
LEVEL = 6
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Size:
    """Of an image or a part of it."""

    packed_bytes: int
    unpacked_bytes: int


def layers(archive: Path) -> list[str]:
    """The layers of the one image of an archive, by their names there, lowest first."""
    with tarfile.open(archive) as found:
        file = found.extractfile("manifest.json")
        assert file is not None, archive
        [image] = json.load(file)
    return list(image["Layers"])


def above_the_base(archives: dict[str, Path]) -> dict[str, Size]:
    """What each image has of its own: the layers that the others lack."""
    held = {name: layers(archive) for name, archive in archives.items()}
    base = set.intersection(*map(set, held.values()))
    assert base, f"no layer is common to all: {held}"
    return {name: _size(archive, [one for one in held[name] if one not in base]) for name, archive in archives.items()}


def _size(archive: Path, names: list[str]) -> Size:
    packed, unpacked = 0, 0
    with tarfile.open(archive) as found:
        for name in names:
            layer = found.extractfile(name)
            assert layer is not None, f"{archive}: {name}"
            one = _size_of(layer)
            packed, unpacked = packed + one.packed_bytes, unpacked + one.unpacked_bytes
    return Size(packed, unpacked)


def _size_of(layer: IO[bytes]) -> Size:
    """Of one layer, which the archive may have packed or not: packed anew in any case."""
    is_packed = layer.read(2) == b"\x1f\x8b"
    layer.seek(0)
    packer, packed, unpacked = zlib.compressobj(LEVEL), 0, 0
    with gzip.GzipFile(fileobj=layer) if is_packed else layer as source:
        while piece := source.read(PIECE_BYTES):
            unpacked += len(piece)
            packed += len(packer.compress(piece))
    return Size(packed + len(packer.flush()), unpacked)
