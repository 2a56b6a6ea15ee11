"""The product's own client of a control plane's API server, and a child for it to write."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.kinds import ENSEMBLE_LABEL, FIELD_MANAGER, MANAGED_BY, Manifest
from tests.support.control_plane import ControlPlane

DEADLINE_S = 200.0


@contextlib.asynccontextmanager
async def connected(plane: ControlPlane) -> AsyncIterator[Cluster]:
    """As the administrator; a body that takes too long is cancelled."""
    cluster = await Cluster.connect(plane.kubeconfig)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield cluster
    finally:
        await cluster.close()


def config_map(namespace: str, name: str, owner: str = "e", **data: str) -> Manifest:
    """A ConfigMap that belongs to the ensemble `owner`."""
    labels = {MANAGED_BY: FIELD_MANAGER, ENSEMBLE_LABEL: owner}
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
