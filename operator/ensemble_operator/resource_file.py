"""An InferenceEnsemble from a file on this machine: read, parsed, and its relative paths made absolute.

Reads the file, the label files it names and, for digests, the model files; writes nothing.
"""

from __future__ import annotations

import hashlib
import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ensemble_operator.api import InferenceEnsemble, Member, parse_yaml
from ensemble_operator.errors import EnsembleError

# What etcd would refuse is a mistake here, too: a model file, most often.
MAX_RESOURCE_BYTES = 1_500_000
MAX_LABELS_BYTES = 16 << 20
DOWNLOAD_TIMEOUT_S = 30.0


class ResourceUnreadable(EnsembleError):
    """The resource, or a label file that it names, cannot be read; the message names the file and the cause."""


def load(path: Path) -> InferenceEnsemble:
    """The resource in a file; a relative `uri` or label file is taken from the file's own folder.

    Raises ResourceUnreadable if there is no such text, InvalidSpec with all that is wrong with it otherwise.
    """
    return parse_text(read(path), str(path), path.resolve().parent)


def parse_text(text: str, source: str, folder: Path) -> InferenceEnsemble:
    """The resource in a text; `source` names it in errors, and relative paths are taken from `folder`.

    Raises InvalidSpec with all that is wrong with it.
    """
    ensemble = parse_yaml(text, source=source)
    spec = ensemble.spec
    members = tuple(replace(m, model=replace(m.model, uri=absolute_uri(m.model.uri, folder))) for m in spec.members)
    labels = {
        output: absolute_uri(names, folder) if isinstance(names, str) else names
        for output, names in spec.labels.items()
    }
    return replace(ensemble, spec=replace(spec, members=members, labels=labels))


def absolute_uri(uri: str, folder: Path) -> str:
    """A `file:` URI or a path, relative to `folder` where it is relative, as an absolute `file://` URI; others as are.

    `file:models/a.pt2` is relative (RFC 8089 has only absolute ones; everybody writes this one anyway).
    """
    local = local_path(uri)
    return uri if local is None else (folder / local).as_uri()


def local_path(uri: str) -> Path | None:
    """The path that a URI names on this machine, or None if it lies elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return None if parts.scheme else Path(uri)


def read_labels(ensemble: InferenceEnsemble) -> dict[str, tuple[str, ...]]:
    """The class names of every output that has some; a file of labels has one name a line.

    Raises ResourceUnreadable naming the output and the file. May take a download: call it in a thread.
    """
    labels: dict[str, tuple[str, ...]] = {}
    for output, names in ensemble.spec.labels.items():
        labels[output] = _label_lines(output, names) if isinstance(names, str) else tuple(names)
    return labels


def with_real_digest(member: Member) -> Member:
    """The member with the SHA-256 of its file where that lies on this machine, so that a changed file is another model.

    A file that cannot be read keeps what was declared: whoever loads it says what is wrong. Reads the file: call it in
    a thread.
    """
    path = local_path(member.model.uri)
    if path is None:
        return member
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return member
    return replace(member, model=replace(member.model, sha256=digest))


def read(path: Path) -> str:
    """The text of a resource's file.

    Raises ResourceUnreadable.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RESOURCE_BYTES + 1)
    except FileNotFoundError:
        raise ResourceUnreadable(f"{path}: no such file; name the YAML file of an InferenceEnsemble") from None
    except IsADirectoryError:
        raise ResourceUnreadable(f"{path}: is a folder; name the YAML file in it") from None
    except OSError as error:
        raise ResourceUnreadable(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_RESOURCE_BYTES:
        raise ResourceUnreadable(f"{path}: is over {MAX_RESOURCE_BYTES} bytes; is it the YAML file of an ensemble?")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ResourceUnreadable(f"{path}: is not text in UTF-8 (byte {error.start}); is it a model file?") from error


def _label_lines(output: str, uri: str) -> tuple[str, ...]:
    where = f"labels of output {output!r} ({uri})"
    path = local_path(uri)
    try:
        if path is not None:
            with path.open("rb") as file:
                content = file.read(MAX_LABELS_BYTES + 1)
        elif urlsplit(uri).scheme in ("http", "https"):
            with urllib.request.urlopen(uri, timeout=DOWNLOAD_TIMEOUT_S) as answer:  # noqa: S310 - scheme checked
                content = answer.read(MAX_LABELS_BYTES + 1)
        else:
            raise ResourceUnreadable(f"{where}: can be a list, a file or an http(s) address")
        if len(content) > MAX_LABELS_BYTES:
            raise ResourceUnreadable(f"{where}: is over {MAX_LABELS_BYTES} bytes; one name a line is expected")
        return tuple(content.decode().splitlines())
    except OSError as error:
        raise ResourceUnreadable(f"{where}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ResourceUnreadable(f"{where}: is not text in UTF-8 (byte {error.start})") from error
