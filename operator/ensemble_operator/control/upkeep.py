"""Keeps an ensemble's children as wanted: applied when they differ, made again when gone, removed when surplus."""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.control.conditions import NameTaken, NotServed
from ensemble_operator.control.drift import Applied
from ensemble_operator.control.errors import Conflict, NotFound
from ensemble_operator.control.keyring import Keyring, contents_of, keyring
from ensemble_operator.control.kinds import (
    CLAIM_TEMPLATE,
    DISRUPTION_BUDGET,
    ENSEMBLE,
    OPTIONAL,
    POD,
    SECRET,
    STATEFUL_SET,
    Key,
    Kind,
    Manifest,
    kind_of,
)
from ensemble_operator.control.observe import Observed
from ensemble_operator.control.world import World
from ensemble_operator.keys import new_pair
from ensemble_operator.manifests import GATEWAY, WORKER, child_name, secret

log = logging.getLogger(__name__)

# Secrets are not watched: they are read again by who looks when they are so old, and somebody looks in time.
SECRET_AGE_S, LONGEST_AGE_S = 200.0, 300.0
TOKEN_BYTES = 32
# Kinds of which an ensemble may come to want fewer.
_SURPLUS_KINDS = (DISRUPTION_BUDGET, CLAIM_TEMPLATE, STATEFUL_SET)


@dataclass(frozen=True, slots=True)
class _Known:
    """A keyring, for which ensemble (by uid) and mode it was read, and when."""

    uid: str
    encrypted: bool
    keyring: Keyring
    read_at: float


class Upkeep:
    """The changes that reconciling makes to children."""

    def __init__(self, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._applied: defaultdict[Key, Applied] = defaultdict(Applied)
        self._keys: dict[Key, _Known] = {}

    async def keyring(self, key: Key, ensemble: InferenceEnsemble, uid: str) -> Keyring:
        """The keys and the token of an ensemble; its Secrets are made, or mended, if need be.

        Raises a ClusterError, or NameTaken.
        """
        encrypted = ensemble.spec.transport.encryption == "curve"
        known = self._keys.get(key)
        fitting = known is not None and (known.uid, known.encrypted) == (uid, encrypted)
        if known is not None and fitting and self._clock() - known.read_at < SECRET_AGE_S:
            return known.keyring
        names = {part: child_name(ensemble.name, part) for part in (WORKER, GATEWAY)}
        found = {part: await self._world.cluster.get(SECRET, key.namespace, name) for part, name in names.items()}
        for part, secret_found in found.items():
            found[part] = await self._ours(key, SECRET, secret_found, uid)
        wanted = keyring(
            contents_of(found[WORKER]),
            contents_of(found[GATEWAY]),
            encrypted=encrypted,
            new_pair=new_pair,
            new_token=lambda: secrets.token_urlsafe(TOKEN_BYTES),
        )
        for part, contents in ((WORKER, wanted.worker), (GATEWAY, wanted.gateway)):
            await self._keep_secret(secret(ensemble, uid, part, contents), found[part], contents)
        self._keys[key] = _Known(uid, encrypted, wanted, self._clock())
        return wanted

    def look_again_s(self, key: Key) -> float:
        """How long the Secrets may go on without being read: they are not watched, and may be deleted or changed."""
        known = self._keys.get(key)
        return 0.0 if known is None else max(0.0, known.read_at + LONGEST_AGE_S - self._clock())

    def forget_keys(self, key: Key) -> None:
        """Read the Secrets again next time: somebody does not accept the token."""
        self._keys.pop(key, None)

    async def apply(self, key: Key, manifests: Iterable[Manifest], uid: str) -> None:
        """Apply those that are not as they shall be.

        Raises a ClusterError, NameTaken if an object of that name is not ours, or NotServed.
        """
        for manifest in manifests:
            kind = kind_of(manifest)
            if kind == SECRET:
                continue
            live = self._world.store.child(kind, key, manifest["metadata"]["name"])
            if not self._applied[key].is_settled(manifest, live):
                try:
                    self._applied[key].note(manifest, await self._apply(key, manifest, live, uid))
                except NotFound as error:
                    if kind in OPTIONAL:
                        raise _not_served(kind) from error
                    raise

    async def remove_surplus(self, key: Key, wanted: Iterable[Manifest], in_use: Iterable[str], uid: str) -> None:
        """Delete the ensemble's children that are wanted no more; not the StatefulSets named `in_use`."""
        names = {(kind_of(manifest), manifest["metadata"]["name"]) for manifest in wanted}
        kept = set(in_use)
        for kind in _SURPLUS_KINDS:
            for child in self._world.store.children(kind, key):
                name = child["metadata"]["name"]
                if (kind, name) not in names and name not in kept and _owner(child).get("uid") == uid:
                    log.info("removing %s %s: it is wanted no more", kind, name)
                    await self._world.cluster.delete(kind, key.namespace, name, uid=child["metadata"].get("uid"))

    async def free_stuck_pods(self, key: Key, seen: Observed, now: float) -> None:
        """Force the deletion of workers whose node is gone: nobody else would, and nothing is lost with them."""
        for view in seen.workers:
            if view.pod.is_stuck(now):
                log.warning("pod %s is on a node that does not answer: its deletion is forced", view.name)
                await self._world.cluster.delete(POD, key.namespace, view.name, uid=view.pod.uid, grace_s=0)

    async def replace_pod(self, key: Key, name: str, uid: str) -> None:
        """Delete a pod, for its StatefulSet to make one of the new template."""
        log.info("replacing pod %s: its template has changed", name)
        await self._world.cluster.delete(POD, key.namespace, name, uid=uid)

    def forget(self, key: Key) -> None:
        """The ensemble is gone."""
        self._keys.pop(key, None)
        self._applied.pop(key, None)

    async def _apply(self, key: Key, manifest: Manifest, live: Manifest | None, uid: str) -> Manifest:
        """Apply a child. `live` is what the store has of that name with the ensemble's label."""
        kind = kind_of(manifest)
        if live is None:
            # Somebody else's, or one of ours that lost its labels, is not in the store; an apply would adopt it.
            await self._ours(key, kind, await self._find(kind, key.namespace, manifest["metadata"]["name"]), uid)
        elif _owner(live):
            await self._ours(key, kind, live, uid)
        return await self._world.cluster.apply(manifest)

    async def _ours(self, key: Key, kind: Kind, found: Manifest | None, uid: str) -> Manifest | None:
        """An object with a child's name, if it is the ensemble's; that of a former ensemble of the name is deleted.

        Raises NameTaken if it is somebody else's, and Conflict while it is about to go.
        """
        owner = _owner(found) if found is not None else {}
        if found is None or owner.get("uid") == uid:
            return found
        name = found["metadata"]["name"]
        if (owner.get("kind"), owner.get("name")) != (ENSEMBLE.name, key.name):
            raise _taken(kind, name)
        if found["metadata"].get("deletionTimestamp"):
            raise Conflict(f"{kind} {name!r} of a former ensemble of this name is being deleted")
        await self._world.cluster.delete(kind, key.namespace, name, uid=found["metadata"].get("uid"))
        return None

    async def _find(self, kind: Kind, namespace: str, name: str) -> Manifest | None:
        found = await self._world.cluster.list(kind, namespace, fields=f"metadata.name={name}")
        return found[0] if found else None

    async def _keep_secret(self, manifest: Manifest, found: Manifest | None, contents: Mapping[str, str]) -> None:
        """Create it, or where it holds something else, make it anew: Secrets are never changed."""
        if found is not None and contents_of(found) == dict(contents):
            return
        cluster, metadata = self._world.cluster, manifest["metadata"]
        if found is not None:
            await cluster.delete(SECRET, metadata["namespace"], metadata["name"], uid=found["metadata"]["uid"])
        await cluster.create(manifest)


def _owner(found: Manifest) -> Manifest:
    """The reference of an object to its controller; empty if it has none."""
    owners = found["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller")), {})


def _taken(kind: Kind, name: str) -> NameTaken:
    return NameTaken(
        f"{kind} {name!r} exists in this namespace and does not belong to this ensemble: delete or rename it, or give"
        " the ensemble another name"
    )


def _not_served(kind: Kind) -> NotServed:
    return NotServed(
        f"this cluster serves no {kind} of {kind.api_version}, which devices.deviceClass needs: use devices.resource"
    )
