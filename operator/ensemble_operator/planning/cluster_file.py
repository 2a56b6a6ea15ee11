"""Planning questions from files: an ensemble or a described cluster, an inventory and profiles from elsewhere.

All these documents have the fields of a described cluster (`allocation.described`); an inventory needs only `devices`,
a file of profiles only `profiles`. What `ensemble profile -o yaml` writes is all three at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ensemble_operator.allocation.described import Described, described
from ensemble_operator.allocation.errors import MIB, InvalidProblem
from ensemble_operator.allocation.problem import Problem
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.api.yamltext import Loader
from ensemble_operator.profiles.measurements import UNMEASURED_OVERHEAD_BYTES, Device, Measurement, declared
from ensemble_operator.resource_file import ResourceUnreadable

Document = Mapping[str, Any]

MAX_FILE_BYTES = 16 << 20
# Of the machine that measured; planning has no use for it.
FAILURES = "failures"
_FACTS = ("parametersMillion", "gmacs", "activationsMillion")
_ROOFLINE = ("tflops", "gbPerS")


def read_document(path: Path) -> Document:
    """The mapping in a YAML or JSON file.

    Raises ResourceUnreadable naming the file and the cause.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ResourceUnreadable(f"{path}: is over {MAX_FILE_BYTES} bytes; is it a description?")
        document = yaml.load(content, Loader)  # noqa: S506  a safe one
    except OSError as error:
        raise ResourceUnreadable(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ResourceUnreadable(f"{path}: {where}not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ResourceUnreadable(f"{path}: not YAML: {str(error) or type(error).__name__}") from error
    if not isinstance(document, Mapping):
        raise ResourceUnreadable(f"{path}: must hold a mapping with fields like devices, members and profiles")
    return document


def is_ensemble(document: Document) -> bool:
    """Whether it is a Kubernetes object rather than a described cluster."""
    return "kind" in document or "apiVersion" in document


def section(path: Path, name: str) -> Document:
    """A file that must have a section: `devices` of an inventory, `profiles` of a file of profiles.

    Raises ResourceUnreadable.
    """
    document = read_document(path)
    if not isinstance(document.get(name), list):
        raise ResourceUnreadable(f"{path}: {name}: a list is expected here; docs/allocation.md shows one")
    return document


def ensemble_document(ensemble: InferenceEnsemble, source: str, classes: Sequence[str]) -> Document:
    """An ensemble as a described cluster without devices; what its members declare is repeated for each class."""
    spec = ensemble.spec
    measured = {(m.name, c): declared(m, c) for m in spec.members for c in classes}
    return {
        "name": ensemble.name,
        "source": source,
        "batchSizes": list(spec.batching.sizes),
        "headroom": spec.devices.memory_headroom,
        "members": [{"name": member.name} for member in spec.members],
        "profiles": profile_entries(measured),
    }


def profile_entries(measured: Mapping[tuple[str, str], Measurement]) -> list[dict[str, Any]]:
    """Measurements as the `profiles` of a described cluster."""
    return [
        {
            "member": member,
            "deviceClass": device_class,
            "batchSize": point.batch_size,
            "rowsPerS": point.rows_per_s,
            "latencyS": point.latency_s,
            "memoryBytes": point.memory_bytes,
        }
        for (member, device_class), found in measured.items()
        for point in found.points
    ]


def device_entries(devices: Sequence[Device], overhead_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Devices of this machine as the `devices` of a described cluster; the smallest stands for its class."""
    by_class: dict[str, list[Device]] = {}
    for device in devices:
        by_class.setdefault(device.device_class, []).append(device)
    return [
        {
            "class": name,
            "kind": alike[0].kind,
            "count": len(alike),
            "capacityMiB": min(d.capacity_bytes for d in alike) // MIB,
            "overheadMiB": -(-overhead_bytes.get(name, UNMEASURED_OVERHEAD_BYTES) // MIB),
        }
        for name, alike in by_class.items()
    ]


def overheads(problem: Problem) -> dict[str, int]:
    """What an idle worker holds, by class of device, as a problem has it."""
    return {device.device_class: device.overhead_bytes for device in problem.devices}


def classes_of(document: Document) -> list[str]:
    """The device classes that a document lists, as far as it can be read."""
    entries = document.get("devices", [])
    return [e["class"] for e in entries if isinstance(e, Mapping) and isinstance(e.get("class"), str)]


def composed(base: Document, inventory: Document | None, profiles: Document | None, source: str) -> Described:
    """The described cluster of a document, with the devices of an inventory and with profiles from elsewhere.

    Where two say something of the same member, class and batch size, `profiles` wins over `base` over `inventory`; so
    does its co-location factor of a class. Of an ensemble's batch sizes those are planned with that something is known
    about. Raises InvalidProblem, each fault with `source` before it.
    """
    others = [document for document in (inventory, profiles) if document]
    merged = {key: value for key, value in base.items() if key != FAILURES}
    if inventory:
        merged["devices"] = inventory["devices"]
    if profiles and "devices" in merged:
        merged["devices"] = _with_factors(merged["devices"], profiles)
    if others:
        merged["profiles"] = _merged_profiles([d for d in (profiles, base, inventory) if d])
        merged["members"] = _with_facts(base.get("members", []), others)
        merged["batchSizes"] = _known_sizes(merged)
    try:
        return described(merged)
    except InvalidProblem as error:
        raise InvalidProblem([f"{source}: {fault}" for fault in error.faults]) from None


def _with_factors(devices: object, profiles: Document) -> object:
    """The devices with the co-location factors that the profiles tell of their classes."""
    told = {repr(e.get("class")): e["colocation"] for e in _mappings(profiles.get("devices")) if "colocation" in e}
    if not isinstance(devices, list):
        return devices
    return [
        {**e, "colocation": told[key]} if isinstance(e, Mapping) and (key := repr(e.get("class"))) in told else e
        for e in devices
    ]


def _mappings(entries: object) -> list[Document]:
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _merged_profiles(documents: Sequence[Document]) -> list[Any]:
    """All profiles, the first of each key; what is no mapping stays, for the check to name it."""
    seen: set[tuple[str, ...]] = set()
    merged = []
    for document in documents:
        keys: set[tuple[str, ...]] = set()
        for entry in document.get("profiles") or []:
            if isinstance(entry, Mapping):
                key = tuple(repr(entry.get(field)) for field in ("member", "deviceClass", "batchSize"))
                if key in seen:
                    continue
                keys.add(key)
            merged.append(entry)
        # One that is twice in the same document is a fault of it, which the check shall see.
        seen |= keys
    return merged


def _with_facts(members: object, others: Sequence[Document]) -> list[Any]:
    """The members, with the public facts that the other documents have of them."""
    facts: dict[object, dict[str, Any]] = {}
    for document in others:
        for entry in _mappings(document.get("members")):
            told = {key: entry[key] for key in _FACTS if key in entry}
            facts.setdefault(repr(entry.get("name")), {}).update(told)
    listed = members if isinstance(members, list) else [members]
    return [{**facts.get(repr(m.get("name")), {}), **m} if isinstance(m, Mapping) else m for m in listed]


def _known_sizes(document: Document) -> Any:
    sizes = document.get("batchSizes")
    estimable = any(all(key in m for key in _FACTS) for m in _mappings(document.get("members"))) and any(
        all(key in d for key in _ROOFLINE) for d in _mappings(document.get("devices"))
    )
    if estimable or not isinstance(sizes, list):
        return sizes
    members = {repr(m.get("name")) for m in _mappings(document.get("members"))}
    classes = {repr(d.get("class")) for d in _mappings(document.get("devices"))}
    known = {
        repr(p.get("batchSize"))
        for p in _mappings(document.get("profiles"))
        if repr(p.get("member")) in members and repr(p.get("deviceClass")) in classes
    }
    # With none left the check says what the profiles lack.
    return [size for size in sizes if repr(size) in known] or sizes
