"""A small client of the Kubernetes API for tests: plain dicts, and nothing of what the product itself uses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from tests.support.control_plane import Refused

Manifest = dict[str, Any]

TIMEOUT_S = 30.0
WITHIN_S = 60.0
MAX_LINE_BYTES = 16 << 20
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"

_GROUPS = {
    "apps/v1": ("StatefulSet", "Deployment", "ReplicaSet", "ControllerRevision"),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "policy/v1": ("PodDisruptionBudget",),
    "resource.k8s.io/v1": ("ResourceClaimTemplate", "ResourceClaim", "ResourceSlice", "DeviceClass"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "coordination.k8s.io/v1": ("Lease",),
    "events.k8s.io/v1": ("Event",),
    "ensemble-operator.io/v1alpha1": ("InferenceEnsemble",),
}
_API_VERSION = {kind: version for version, kinds in _GROUPS.items() for kind in kinds}
_CLUSTER_WIDE = ("Node", "Namespace", "ResourceSlice", "DeviceClass")


def path_of(kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    """The path of an object, or of all objects of a kind; of all namespaces without one."""
    version = _API_VERSION.get(kind, "v1")
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    scope = f"/namespaces/{namespace}" if namespace and kind not in _CLUSTER_WIDE else ""
    plural = f"{kind.lower()[:-1]}ies" if kind.endswith("y") else f"{kind.lower()}{'es' if kind.endswith('s') else 's'}"
    return "/".join(part for part in (f"{root}{scope}", plural, name, subresource) if part)


class KubeClient:
    """Requests with the identity of a kubeconfig, on one event loop: `async with KubeClient(kubeconfig) as kube`."""

    def __init__(self, kubeconfig: Path) -> None:
        found = yaml.safe_load(kubeconfig.read_text())
        cluster = found["clusters"][0]["cluster"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._url = cluster["server"]
        self._token = found["users"][0]["user"]["token"]
        self._ssl = ssl.create_default_context(cadata=authority)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            self._url,
            headers={"Authorization": f"Bearer {self._token}"},
            connector=aiohttp.TCPConnector(ssl=self._ssl),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            read_bufsize=MAX_LINE_BYTES,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(
        self, method: str, path: str, body: object = None, content_type: str = "application/json", **query: str
    ) -> Any:
        """One request; the JSON of its answer. Raises Refused, and aiohttp.ClientError or TimeoutError."""
        assert self._session is not None
        text = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type}
        async with self._session.request(method, path, data=text, headers=headers, params=query) as response:
            answer = await response.json(content_type=None)
            if response.status >= 400:
                raise Refused(response.status, answer if isinstance(answer, dict) else {"message": str(answer)})
            return answer

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """An object; None if there is none."""
        try:
            return dict(await self.ask("GET", path_of(kind, namespace, name)))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str = "", **query: str) -> list[Manifest]:
        """The objects of a kind; `labelSelector` and `fieldSelector` as in the API."""
        return list((await self.ask("GET", path_of(kind, namespace), **query))["items"])

    async def create(self, manifest: Mapping[str, Any]) -> Manifest:
        """Create an object in its namespace."""
        namespace = manifest["metadata"].get("namespace", "")
        return dict(await self.ask("POST", path_of(manifest["kind"], namespace), manifest))

    async def apply(self, manifest: Mapping[str, Any], manager: str = "tests", **query: str) -> Manifest:
        """Server-side apply, forced, with strict validation."""
        metadata = manifest["metadata"]
        path = path_of(manifest["kind"], metadata.get("namespace", ""), metadata["name"])
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict", **query}
        return dict(await self.ask("PATCH", path, manifest, APPLY, **query))

    async def patch(self, kind: str, namespace: str, name: str, patch: object, subresource: str = "") -> Manifest:
        """A JSON merge patch."""
        return dict(await self.ask("PATCH", path_of(kind, namespace, name, subresource), patch, MERGE))

    async def delete(self, kind: str, namespace: str, name: str, *, grace_s: int | None = None, uid: str = "") -> None:
        """Delete an object; one that is not there, or is another's by now, is fine."""
        body: Manifest = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self.ask("DELETE", path_of(kind, namespace, name), body)
        except Refused as refused:
            if refused.status not in (404, 409):
                raise

    async def watch(self, kind: str, namespace: str = "", **query: str) -> AsyncIterator[tuple[str, Manifest]]:
        """LISTED with a kind's list, then what happens to its objects. Ends, or raises, when the connection does."""
        assert self._session is not None
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S)
        found = await self.ask("GET", path_of(kind, namespace), **query)
        yield "LISTED", found
        query = {**query, "watch": "true", "resourceVersion": found["metadata"]["resourceVersion"]}
        async with self._session.get(path_of(kind, namespace), params=query, timeout=timeout) as response:
            if response.status >= 400:
                raise Refused(response.status, {"message": await response.text()})
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise Refused(int(event["object"].get("code", 500)), event["object"])
                yield event["type"], event["object"]

    async def wait_for(
        self,
        kind: str,
        namespace: str,
        name: str,
        condition: Callable[[Manifest | None], bool],
        within_s: float = WITHIN_S,
    ) -> Manifest | None:
        """Wait until an object (None: there is none) is as the condition says; AssertionError shows what it is."""
        deadline = time.monotonic() + within_s
        found: Manifest | None = None
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, Refused):
                found = await self.get(kind, namespace, name)
                if condition(found):
                    return found
            assert time.monotonic() < deadline, f"{kind} {namespace}/{name} not within {within_s} s: {shown(found)}"
            await asyncio.sleep(0.1)


def shown(manifest: Manifest | None) -> str:
    """An object as a person reads it, without who manages which field."""
    if manifest is None:
        return "it is not there"
    kept = {**manifest, "metadata": {k: v for k, v in manifest["metadata"].items() if k != "managedFields"}}
    return f"\n{yaml.safe_dump(kept, sort_keys=False)}"


def condition_of(manifest: Manifest | None, kind: str) -> Manifest:
    """A condition of an object's status; empty if it has none of that type."""
    conditions = ((manifest or {}).get("status") or {}).get("conditions") or []
    return next((dict(condition) for condition in conditions if condition["type"] == kind), {})


def is_ready(pod: Manifest | None) -> bool:
    """Whether a pod is there and Ready."""
    return condition_of(pod, "Ready").get("status") == "True"
