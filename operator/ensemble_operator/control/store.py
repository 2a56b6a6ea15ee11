"""What the API server was last seen to hold: ensembles and their children, by ensemble. Pure.

Fed by watches, by what kopf sees, and by the answers to our own writes; older versions never replace newer ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from ensemble_operator.control.kinds import (
    DISRUPTION_BUDGET,
    ENSEMBLE,
    NETWORK_POLICY,
    WATCHED,
    Key,
    Kind,
    Manifest,
    key_of,
    kind_of,
    owner_of,
)

_Name = tuple[str, str]
# Their status says nothing that a decision rests on, and changes with every pod.
_STATUS_IS_NOISE = frozenset({DISRUPTION_BUDGET, NETWORK_POLICY, ENSEMBLE})
_NOISE = frozenset({"resourceVersion", "managedFields", "selfLink"})
MAX_GONE = 4_096
_CONDITION_NOISE = frozenset({"lastUpdateTime", "lastProbeTime", "lastHeartbeatTime", "observedGeneration"})


class Store:
    """Objects by kind and name, and an index of children by ensemble. Objects are shared: never change them."""

    def __init__(self) -> None:
        self._objects: defaultdict[Kind, dict[_Name, Manifest]] = defaultdict(dict)
        self._children: defaultdict[Key, defaultdict[Kind, dict[str, Manifest]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        # Objects seen to go: a late answer to our own write must not bring them back.
        self._gone: dict[tuple[Kind, str], int] = {}

    def ensemble(self, key: Key) -> Manifest | None:
        """An InferenceEnsemble; None if there is none."""
        return self._objects[ENSEMBLE].get((key.namespace, key.name))

    def ensembles(self) -> Iterator[Manifest]:
        """All InferenceEnsembles."""
        return iter(list(self._objects[ENSEMBLE].values()))

    def keys(self) -> set[Key]:
        """The keys of all InferenceEnsembles."""
        return {Key(*name) for name in self._objects[ENSEMBLE]}

    def child(self, kind: Kind, key: Key, name: str) -> Manifest | None:
        """A child of an ensemble; None if it is not there, or carries another ensemble's label."""
        return self._of(key, kind).get(name)

    def children(self, kind: Kind, key: Key) -> list[Manifest]:
        """Children of a kind, by name."""
        return [found for _, found in sorted(self._of(key, kind).items())]

    def count(self, kind: Kind) -> int:
        """How many objects of a kind are known."""
        return len(self._objects[kind])

    def note(self, found: Manifest) -> Key | None:
        """An object was seen, in an event or in an answer; the ensemble to look at, if it matters."""
        kind, name = kind_of(found), _name(found)
        known = self._objects[kind].get(name)
        if known is not None and _version(found) < _version(known):
            return None
        if _version(found) < self._gone.get((kind, _uid(found)), 0):
            return None
        self._put(kind, name, found)
        if known is not None and not _matters(kind, known, found):
            return None
        return _key(kind, found)

    def note_written(self, found: Manifest) -> Key | None:
        """What the API server answered to a change of ours, so that the next look sees it. As `note`.

        Kinds that nobody follows are left out: what is noted must also be removed one day.
        """
        kind = kind_of(found)
        return self.note(found) if kind == ENSEMBLE or kind in WATCHED else None

    def remove(self, found: Manifest) -> Key | None:
        """An object was seen to be gone; the ensemble to look at, if it matters."""
        kind, name = kind_of(found), _name(found)
        self._gone[kind, _uid(found)] = _version(found)
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        known = self._objects[kind].get(name)
        if known is None or (_uid(known) != _uid(found) and _version(found) < _version(known)):
            return None
        self._drop(kind, name)
        return _key(kind, known)

    def replace(self, kind: Kind, found: Iterable[Manifest], version: str) -> set[Key]:
        """A list of all objects of a kind, as of a version; the ensembles to look at."""
        listed = {_name(item): item for item in found}
        changed = {self.note(item) for item in listed.values()}
        for name, known in list(self._objects[kind].items()):
            # What we wrote after the list was made is not in it.
            if name not in listed and _version(known) <= _number(version):
                self._drop(kind, name)
                changed.add(_key(kind, known))
        return {key for key in changed if key is not None}

    def forget(self, key: Key) -> None:
        """An ensemble is known to be gone."""
        self._drop(ENSEMBLE, (key.namespace, key.name))

    def _of(self, key: Key, kind: Kind) -> dict[str, Manifest]:
        kinds = self._children.get(key)
        return {} if kinds is None else kinds.get(kind, {})

    def _put(self, kind: Kind, name: _Name, found: Manifest) -> None:
        self._drop(kind, name)
        self._objects[kind][name] = found
        owner = None if kind == ENSEMBLE else owner_of(found)
        if owner is not None:
            self._children[owner][kind][name[1]] = found

    def _drop(self, kind: Kind, name: _Name) -> None:
        known = self._objects[kind].pop(name, None)
        owner = None if known is None or kind == ENSEMBLE else owner_of(known)
        if owner is None:
            return
        kinds = self._children[owner]
        kinds[kind].pop(name[1], None)
        if not any(kinds.values()):
            del self._children[owner]


def _key(kind: Kind, found: Manifest) -> Key | None:
    return key_of(found) if kind == ENSEMBLE else owner_of(found)


def _matters(kind: Kind, known: Manifest, found: Manifest) -> bool:
    """Whether anything changed that a reconcile could decide by."""
    return _significant(kind, known) != _significant(kind, found)


def _significant(kind: Kind, found: Manifest) -> Manifest:
    parts: Manifest = {name: part for name, part in found.items() if name not in ("metadata", "status")}
    parts["metadata"] = {name: part for name, part in found["metadata"].items() if name not in _NOISE}
    if kind not in _STATUS_IS_NOISE:
        parts["status"] = _quiet(found.get("status") or {})
    return parts


def _quiet(status: Manifest) -> Manifest:
    conditions: list[dict[str, Any]] = status.get("conditions") or []
    return {
        **{name: part for name, part in status.items() if name != "observedGeneration"},
        "conditions": [
            {name: part for name, part in condition.items() if name not in _CONDITION_NOISE} for condition in conditions
        ],
    }


def _name(found: Manifest) -> _Name:
    return found["metadata"].get("namespace", ""), found["metadata"]["name"]


def _uid(found: Manifest) -> str:
    return str(found["metadata"].get("uid", ""))


def _version(found: Manifest) -> int:
    return _number(found["metadata"].get("resourceVersion", ""))


def _number(version: str) -> int:
    """Versions are comparable as numbers (KEP-5504)."""
    return int(version) if version.isdecimal() else 0
