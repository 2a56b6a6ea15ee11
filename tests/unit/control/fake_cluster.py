"""An API server in memory, for tests of what the reconcile asks of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import Conflict
from ensemble_operator.control.kinds import Kind, Manifest, Manifests, kind_of
from ensemble_operator.control.metrics import Instruments
from ensemble_operator.control.settings import Settings
from ensemble_operator.control.store import Store
from ensemble_operator.control.world import World


class FakeCluster:
    """Objects by kind and name, in one namespace; `failing` has what is raised for a kind instead of an answer."""

    def __init__(self, store: Store, *objects: Manifest) -> None:
        self._store = store
        self.objects = {(kind_of(m), m["metadata"]["name"]): m for m in objects}
        self.failing: dict[Kind, Exception] = {}
        self.statuses: list[Manifest] = []
        self.events: list[tuple[str, str]] = []
        self.deleted: list[tuple[str, str]] = []
        self.lists: list[Kind] = []

    def guard(self) -> None:
        """It leads."""

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        self._may_fail(kind)
        return self.objects.get((kind, name))

    async def list(self, kind: Kind, namespace: str | None = None, **options: Any) -> Manifests:
        self._may_fail(kind)
        self.lists.append(kind)
        name = str(options.get("fields", "")).removeprefix("metadata.name=")
        return [m for (of, called), m in self.objects.items() if of == kind and name in ("", called)]

    async def pages(
        self, kind: Kind, namespace: str | None = None, **options: Any
    ) -> AsyncIterator[tuple[Manifests, str]]:
        yield await self.list(kind, namespace), ""

    async def create(self, manifest: Manifest) -> Manifest:
        name = (kind_of(manifest), manifest["metadata"]["name"])
        if name in self.objects:
            raise Conflict("it exists")
        return await self.apply(manifest)

    async def apply(self, manifest: Manifest) -> Manifest:
        kind, name = kind_of(manifest), manifest["metadata"]["name"]
        self._may_fail(kind)
        version = str(len(self.objects) + 1)
        made = {**manifest, "metadata": {"uid": f"uid-{name}", **manifest["metadata"], "resourceVersion": version}}
        self.objects[kind, name] = made
        self._store.note_written(made)
        return made

    async def apply_status(self, manifest: Manifest) -> Manifest:
        self.statuses.append(manifest["status"])
        return manifest

    async def delete(self, kind: Kind, namespace: str | None, name: str, **options: Any) -> bool:
        self.deleted.append((kind.name, name))
        return self.objects.pop((kind, name), None) is not None

    async def event(self, regarding: Manifest, type_: str, reason: str, message: str, action: str) -> None:
        self.events.append((reason, message))

    def _may_fail(self, kind: Kind) -> None:
        if kind in self.failing:
            raise self.failing[kind]


def world_of(*objects: Manifest, **settings: Any) -> tuple[World, FakeCluster]:
    """A world whose store has seen nothing yet, and its API server."""
    store = Store()
    cluster = FakeCluster(store, *objects)
    return World(cast("Cluster", cluster), store, Settings(**settings), Instruments()), cluster


def condition(status: Manifest, type_: str) -> dict[str, Any]:
    """A condition of a status."""
    return next((dict(found) for found in status["conditions"] if found["type"] == type_), {})
