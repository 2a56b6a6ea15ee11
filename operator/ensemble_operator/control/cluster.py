"""The API server, as verbs on plain dicts: a request each, with a time limit, tried again where that may help.

Objects come without `managedFields`. No discovery: `kinds` has what is needed to address an object.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ensemble_operator.control.credentials import Access, Connection
from ensemble_operator.control.errors import NotFound, Unavailable
from ensemble_operator.control.events import EventMemory, Happening
from ensemble_operator.control.kinds import EVENT, FIELD_MANAGER, LEASE, Kind, Manifest, Manifests, kind_of
from ensemble_operator.control.responses import Call, error_of
from ensemble_operator.control.transport import APPLY, JSON, MERGE, Retries, Transport

PAGE_SIZE = 500
ONCE = Retries(delays_s=())
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class Cluster:
    """One cluster, as we are there.

    `guard` is called before anything is changed, and raises if this process may not change anything (any more);
    `on_written` gets each object as the server answered it to a change.
    """

    def __init__(self, transport: Transport, connection: Connection, reporter: str) -> None:
        self.guard: Callable[[], None] = lambda: None
        self.on_written: Callable[[Manifest], object] = lambda _: None
        self._transport = transport
        self._connection = connection
        self._events = EventMemory(reporter)

    @staticmethod
    async def connect(kubeconfig: Path | None = None, context: str | None = None, reporter: str = "local") -> Cluster:
        """Connect with a kubeconfig, or without one as the service account of this pod.

        Raises NoCredentials if neither can be read. The server is not asked.
        """
        connection = await Connection.open(kubeconfig, context)
        transport = Transport(connection.session(), connection.server, connection, connection.options)
        return Cluster(transport, connection, reporter)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    @property
    def request_counts(self) -> Mapping[tuple[str, str, int], int]:
        """Requests so far by (verb, resource, HTTP code); 0 where there was no answer."""
        return self._transport.counts

    async def access(self) -> Access:
        """What another client needs to be who we are."""
        await self._connection.renew()
        return await self._connection.access()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        """An object; None if it is not there."""
        try:
            return _clean(await self._transport.send(Call("get", kind, namespace, name), "GET"))
        except NotFound:
            return None

    async def pages(
        self,
        kind: Kind,
        namespace: str | None = None,
        labels: str = "",
        *,
        fields: str = "",
        metadata_only: bool = False,
        newest: bool = True,
    ) -> AsyncIterator[tuple[Manifests, str]]:
        """Pages of objects, each with the resource version of the whole list.

        `newest` False takes what the server has at hand, which costs it less. Raises Expired if the list changed so
        much while it was read that it must be read again.
        """
        call = Call("list", kind, namespace)
        query = {"limit": str(PAGE_SIZE), **_selectors(labels, fields)}
        if not newest:
            query = {"resourceVersion": "0", **_selectors(labels, fields)}
        accept = METADATA_LIST if metadata_only else JSON
        while True:
            page = await self._transport.send(call, "GET", query, accept=accept, timeout_s=30)
            items = [_typed(_clean(item), kind) for item in page.get("items") or ()]
            metadata = page.get("metadata") or {}
            yield items, str(metadata.get("resourceVersion", ""))
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def list(self, kind: Kind, namespace: str | None = None, labels: str = "", **options: Any) -> Manifests:
        """All objects of a kind, of one namespace or of all. Options as for `pages`."""
        found, _ = await self.list_with_version(kind, namespace, labels, **options)
        return found

    async def list_with_version(
        self, kind: Kind, namespace: str | None = None, labels: str = "", **options: Any
    ) -> tuple[Manifests, str]:
        """All objects, and the resource version from which a watch goes on."""
        found: Manifests = []
        version = ""
        async for items, version in self.pages(kind, namespace, labels, **options):  # noqa: B007  # the last one counts
            found.extend(items)
        return found, version

    async def watch(
        self, kind: Kind, namespace: str | None, labels: str, version: str, duration_s: int
    ) -> AsyncIterator[tuple[str, Manifest]]:
        """Changes since a resource version, as (ADDED | MODIFIED | DELETED | BOOKMARK, object); first (OPENED, {}).

        Ends when the server ends it. Raises Expired if the version is too old.
        """
        call = Call("watch", kind, namespace)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(duration_s),
            **_selectors(labels, ""),
        }
        async for line in self._transport.stream(call, query):
            if not line:
                yield "OPENED", {}
                continue
            try:
                event = msgspec.json.decode(line)
                change, found = event["type"], event["object"]
            except (msgspec.DecodeError, KeyError, TypeError) as error:
                raise Unavailable(f"{call}: a line that is no event: {error}") from error
            if change == "ERROR":
                raise error_of(call, int(found.get("code", 500)), msgspec.json.encode(found))
            yield change, _clean(found)

    async def create(self, manifest: Manifest) -> Manifest:
        """Create an object.

        Raises Conflict if it exists.
        """
        kind, namespace, _ = _address(manifest)
        return await self._change(Call("create", kind, namespace), "POST", {"fieldManager": FIELD_MANAGER}, manifest)

    async def apply(self, manifest: Manifest, force: bool = True) -> Manifest:
        """Server-side apply: create the object, or make the fields that the manifest has what it says.

        Without `force`, raises Conflict if another manager owns one of them. Raises Invalid for a field that the
        server does not know.
        """
        kind, namespace, name = _address(manifest)
        return await self._apply(Call("patch", kind, namespace, name), manifest, force)

    async def apply_status(self, manifest: Manifest) -> Manifest:
        """Server-side apply to the subresource status, forced.

        Raises NotFound if the object is gone.
        """
        kind, namespace, name = _address(manifest)
        return await self._apply(Call("patch", kind, namespace, name, "status"), manifest, force=True)

    async def merge(self, kind: Kind, namespace: str | None, name: str, patch: Manifest) -> Manifest:
        """JSON merge patch (RFC 7386)."""
        call = Call("patch", kind, namespace, name)
        return await self._change(call, "PATCH", {"fieldManager": FIELD_MANAGER}, patch, MERGE)

    async def delete(
        self, kind: Kind, namespace: str | None, name: str, *, uid: str | None = None, grace_s: int | None = None
    ) -> bool:
        """Delete an object; False if it is gone already.

        With `uid` only that very object: raises Conflict if the name has been given to another. What it owns goes in
        the background.
        """
        options: Manifest = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        try:
            await self._change(Call("delete", kind, namespace, name), "DELETE", None, options)
        except NotFound:
            return False
        return True

    async def read_lease(self, namespace: str, name: str, timeout_s: float) -> Manifest | None:
        """A Lease; None if there is none. Asked once: whoever asks does so again anyway."""
        call = Call("get", LEASE, namespace, name)
        try:
            return await self._transport.send(call, "GET", timeout_s=timeout_s, retries=ONCE)
        except NotFound:
            return None

    async def write_lease(self, lease: Manifest, timeout_s: float) -> Manifest:
        """Create a Lease, or update it if it has a resource version. Not guarded: it is what the guard rests on.

        Raises Conflict if somebody else wrote it.
        """
        metadata = lease["metadata"]
        if "resourceVersion" not in metadata:
            call, method = Call("create", LEASE, metadata["namespace"]), "POST"
        else:
            call, method = Call("update", LEASE, metadata["namespace"], metadata["name"]), "PUT"
        return _clean(await self._transport.send(call, method, None, lease, timeout_s=timeout_s, retries=ONCE))

    async def event(
        self,
        regarding: Manifest,
        type: str,  # noqa: A002  # the API's name
        reason: str,
        message: str,
        action: str,
    ) -> None:
        """Post an event about an object; the same one again within minutes only counts up.

        Raises a ClusterError; whether an event is worth a retry is the caller's business.
        """
        happening, now = Happening.about(regarding, type, reason, message, action), time.time()
        series = self._events.again(happening, now)
        if series is not None:
            name, patch = series
            try:
                await self.merge(EVENT, happening.namespace, name, patch)
            except NotFound:
                self._events.forget(happening)
            else:
                return
        manifest = self._events.first(happening, now)
        await self.create(manifest)
        self._events.remember(happening, manifest["metadata"]["name"], now)

    async def _apply(self, call: Call, manifest: Manifest, force: bool) -> Manifest:
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", "force": "true" if force else "false"}
        return await self._change(call, "PATCH", query, manifest, APPLY)

    async def _change(
        self, call: Call, method: str, query: dict[str, str] | None, body: Manifest, content_type: str = JSON
    ) -> Manifest:
        self.guard()
        found = _clean(await self._transport.send(call, method, query, body, content_type=content_type))
        if method != "DELETE":
            self.on_written(found)
        return found


def _address(manifest: Manifest) -> tuple[Kind, str | None, str]:
    kind = kind_of(manifest)
    metadata = manifest["metadata"]
    return kind, metadata.get("namespace") if kind.namespaced else None, metadata["name"]


def _clean(found: Manifest) -> Manifest:
    metadata = found.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return found


def _typed(item: Manifest, kind: Kind) -> Manifest:
    """Items of a list come without kind and version."""
    return {"apiVersion": kind.api_version, "kind": kind.name, **item} if "kind" not in item else item


def _selectors(labels: str, fields: str) -> dict[str, str]:
    found = {"labelSelector": labels, "fieldSelector": fields}
    return {name: value for name, value in found.items() if value}
