"""The InferenceEnsembles in the store: listed at the start, told by kopf, and compared with the cluster now and then.

kopf does not tell which resources went while it could not watch, and a watch may die in silence. So their metadata is
listed once a minute, and as soon as the API server is back; what is not as it should be is read and noted. Until then
nothing is decided: children must not be made for a resource that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import ClusterError, NotFound, Unavailable
from ensemble_operator.control.kinds import ENSEMBLE, Key, Manifest, key_of
from ensemble_operator.control.store import Store

log = logging.getLogger(__name__)

COMPARE_S = 60.0
PAUSE_S = 1.0


class Ensembles:
    """Keeps the ensembles of a store true; calls `on_change` with each that changed in a way that matters.

    `on_missed` is called when something was not told although there was no outage: the watch is dead.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        on_change: Callable[[Key], None],
        namespace: str | None,
        on_missed: Callable[[], None] = lambda: None,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._on_change, self._on_missed = on_change, on_missed
        self._namespace = namespace
        self._woken = asyncio.Event()
        self._certain = asyncio.Event()
        self._problem = ""

    async def list(self) -> None:
        """Read all of them, until that succeeds."""
        while True:
            try:
                found, version = await self._cluster.list_with_version(ENSEMBLE, self._namespace)
            except ClusterError as error:
                self._tell(error)
                await asyncio.sleep(PAUSE_S)
            else:
                for key in self._store.replace(ENSEMBLE, found, version):
                    self._on_change(key)
                self._problem = ""
                self._certain.set()
                return

    def seen(self, change: str, found: Manifest) -> None:
        """An event that kopf told."""
        found["metadata"].pop("managedFields", None)
        key = self._store.remove(found) if change == "DELETED" else self._store.note(found)
        if key is not None:
            self._on_change(key)

    def doubt(self) -> None:
        """Something may have been missed: compare as soon as the API server answers."""
        self._certain.clear()
        self._woken.set()

    async def certain(self) -> None:
        """Wait until there is no doubt."""
        await self._certain.wait()

    async def run(self) -> None:
        """Compare until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPARE_S):
                    await self._woken.wait()
            self._woken.clear()
            doubted = not self._certain.is_set()
            try:
                if await self.compare() and not doubted:
                    self._on_missed()
            except ClusterError as error:
                self._tell(error)
                await asyncio.sleep(PAUSE_S)
                self._woken.set()
            else:
                self._problem = ""
                if not self._woken.is_set():
                    self._certain.set()

    async def compare(self) -> int:
        """Read what the cluster has otherwise; how many that were.

        Raises ClusterError.
        """
        known = self._store.keys()
        before = {key: _state(self._store.ensemble(key)) for key in known}
        listed = await self._cluster.list(ENSEMBLE, self._namespace, metadata_only=True)
        there = {key_of(item): _state(item) for item in listed}
        # What changed since the list was asked for has been told in the meantime.
        suspects = [
            key
            for key in sorted(there.keys() | before.keys())
            if there.get(key) != before.get(key) and _state(self._store.ensemble(key)) == before.get(key)
        ]
        missed = [key for key in suspects if await self._read(key)]
        if missed:
            log.info("changes of %d InferenceEnsembles had been missed: %s", len(missed), ", ".join(map(str, missed)))
        return len(missed)

    async def _read(self, key: Key) -> bool:
        known = _state(self._store.ensemble(key))
        found = await self._cluster.get(ENSEMBLE, key.namespace, key.name)
        if _state(found) == known:
            return False
        if found is None:
            self._store.forget(key)
        else:
            self._store.note(found)
        self._on_change(key)
        return True

    def _tell(self, error: ClusterError) -> None:
        if self._problem != error.reason:
            remedy = "; install its definition (the folder crds)" if isinstance(error, NotFound) else ""
            level = logging.WARNING if isinstance(error, Unavailable) else logging.ERROR
            log.log(level, "cannot list InferenceEnsembles, and try again: %s%s", error, remedy)
        self._problem = error.reason


def _state(found: Manifest | None) -> tuple[str, int] | None:
    """What changes when a resource is made anew, or its spec is edited."""
    if found is None:
        return None
    return found["metadata"].get("uid", ""), int(found["metadata"].get("generation") or 0)
