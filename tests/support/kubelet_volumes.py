"""A pod's volumes as folders of this machine, and its container's command with the paths and address it has here."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Manifest = Mapping[str, Any]
# ConfigMaps and Secrets by kind and name.
Objects = Mapping[tuple[str, str], Manifest]

ANY_ADDRESS = ("0.0.0.0", "[::]")
_VERSIONS = itertools.count(1)


class Missing(Exception):
    """A volume's source is not there yet: the pod has to wait, as it would on a real node."""


class Volumes:
    """The volumes of one pod below a folder. `claims`: the folders of PersistentVolumeClaims."""

    def __init__(self, pod: Manifest, folder: Path, claims: Mapping[str, Path]) -> None:
        self._volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        self._written: dict[str, Mapping[str, bytes]] = {}
        self._folder, self._claims = folder, claims

    def sync(self, objects: Objects) -> None:
        """Write what is new, all files of a volume at once as kubelets do. Raises Missing."""
        for name, volume in self._volumes.items():
            folder = self._folder / name
            if "emptyDir" in volume:
                folder.mkdir(parents=True, exist_ok=True)
            elif "configMap" in volume:
                self._write(name, _content("ConfigMap", volume["configMap"]["name"], volume["configMap"], objects))
            elif "secret" in volume:
                self._write(name, _content("Secret", volume["secret"]["secretName"], volume["secret"], objects))
            elif "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                if claim not in self._claims:
                    raise Missing(f'persistentvolumeclaim "{claim}" not found')

    def folders(self, container: Manifest) -> dict[str, Path]:
        """The folder behind each mount path of a container, longest path first."""
        found = {}
        for mount in container.get("volumeMounts", []):
            claim = self._volumes[mount["name"]].get("persistentVolumeClaim")
            found[mount["mountPath"]] = self._claims[claim["claimName"]] if claim else self._folder / mount["name"]
        return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))

    def remove(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, content: Mapping[str, bytes]) -> None:
        folder = self._folder / name
        if self._written.get(name) == content:
            return
        version = folder / f"..{next(_VERSIONS)}"
        version.mkdir(parents=True)
        for key, value in content.items():
            (version / key).write_bytes(value)
            link = folder / key
            if not link.is_symlink():
                link.symlink_to(f"..data/{key}")
        fresh, current = folder / "..data_tmp", folder / "..data"
        fresh.symlink_to(version.name)
        before = folder / current.readlink() if current.is_symlink() else None
        fresh.rename(current)
        for key in set(self._written.get(name, {})) - set(content):
            (folder / key).unlink()
        if before is not None:
            shutil.rmtree(before)
        self._written[name] = content


def _content(kind: str, name: str, source: Manifest, objects: Objects) -> dict[str, bytes]:
    found = objects.get((kind, name))
    if found is None:
        if source.get("optional"):
            return {}
        raise Missing(f'MountVolume.SetUp failed: {kind.lower()} "{name}" not found')
    binary = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
    if kind == "Secret":
        return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
    return {**{key: value.encode() for key, value in (found.get("data") or {}).items()}, **binary}


def local_command(container: Manifest, ip: str, env: Mapping[str, str], folders: Mapping[str, Path]) -> list[str]:
    """The command as it runs here: variables expanded, folders and address of the pod, and this Python."""
    found = []
    for part in [*container.get("command", []), *container.get("args", [])]:
        text = re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), part)
        for anywhere in ANY_ADDRESS:
            text = text.replace(anywhere, ip)
        found.append(local_path(text, folders))
    return [sys.executable if found[0] == "python" else found[0], *found[1:]]


def local_path(text: str, folders: Mapping[str, Path]) -> str:
    """A text that is a path below a mount, as the path that it has here; other texts are what they are."""
    for mount, folder in folders.items():
        if text == mount or text.startswith(f"{mount}/"):
            return f"{folder}{text[len(mount) :]}"
    return text


def environment_of(pod: Manifest, container: Manifest, ip: str, objects: Objects) -> dict[str, str]:
    """The variables that the container's `env` and `envFrom` give it. Raises Missing."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "secretRef" in source:
            reference = source["secretRef"]
            content = _content("Secret", reference["name"], reference, objects)
            found |= {key: value.decode() for key, value in content.items()}
    fields = {
        "metadata.name": pod["metadata"]["name"],
        "metadata.namespace": pod["metadata"]["namespace"],
        "status.podIP": ip,
        "spec.nodeName": pod["spec"]["nodeName"],
    }
    for entry in container.get("env", []):
        reference = (entry.get("valueFrom") or {}).get("fieldRef")
        found[entry["name"]] = fields[reference["fieldPath"]] if reference else entry.get("value", "")
    return found
