"""Gives the images of archives a second tag: `python -m tests.cluster.second_tag TAG ARCHIVE...`

The archives are those of `docker save` and of buildah's docker-archive: images are named in `manifest.json`, and in
newer ones in the `index.json` of an OCI layout too. What comes later in an archive replaces what came before: nothing
is copied but new lists of names.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAME, REFERENCE = "io.containerd.image.name", "org.opencontainers.image.ref.name"


def in_manifest(images: list[dict[str, Any]], tag: str) -> list[dict[str, Any]]:
    """`manifest.json` with the tag."""
    return [{**image, "RepoTags": _both(image["RepoTags"], tag)} for image in images]


def in_index(index: dict[str, Any], tag: str) -> dict[str, Any]:
    """`index.json` with the tag: each image once more."""
    found = {one["annotations"][NAME]: one for one in index["manifests"] if NAME in one.get("annotations", {})}
    for name, one in list(found.items()):
        other = _retagged(name, tag)
        found[other] = {**one, "annotations": {**one["annotations"], NAME: other, REFERENCE: tag}}
    others = [one for one in index["manifests"] if NAME not in one.get("annotations", {})]
    return {**index, "manifests": [*others, *found.values()]}


LISTS: Mapping[str, Callable[[Any, str], Any]] = {"manifest.json": in_manifest, "index.json": in_index}


def add_tag(archive: Path, tag: str) -> None:
    """Give each image of an archive this tag too. Raises ValueError if it is an archive of another form."""
    with tarfile.open(archive) as found:
        there = set(found.getnames())
        if "manifest.json" not in there:
            raise ValueError(f"{archive}: no archive of `docker save`: it has no manifest.json")
        lists = {name: json.loads(_read(found, name)) for name in LISTS if name in there}
    with tarfile.open(archive, "a") as appended:
        for name, content in lists.items():
            text = json.dumps(LISTS[name](content, tag)).encode()
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            appended.addfile(entry, io.BytesIO(text))


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    return file.read() if file else b""


def _both(names: list[str], tag: str) -> list[str]:
    return sorted({*names, *(_retagged(name, tag) for name in names)})


def _retagged(name: str, tag: str) -> str:
    return f"{name.rpartition(':')[0]}:{tag}"


def main(tag: str, *archives: str) -> None:
    """Give the images of all archives this tag too."""
    for archive in archives:
        add_tag(Path(archive), tag)


if __name__ == "__main__":
    main(*sys.argv[1:])
