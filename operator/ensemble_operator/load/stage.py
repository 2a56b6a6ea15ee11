"""A gateway and workers on this machine, for as long as candidates are measured through them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ensemble_operator.plans import ensemble_plan, gateway_plan
from ensemble_operator.serve.deployment import Deployment, Place
from ensemble_operator.serve.preparation import Planned, ServeOptions
from ensemble_operator.serve.runtime_folder import runtime_folder

HOST = "127.0.0.1"


def stage_options(file: Path, cpu_devices: int | None, cache_folder: Path, runtime_base: str | None) -> ServeOptions:
    """What an ensemble is prepared with for a stage: a free port of this machine, shared memory."""
    return ServeOptions(file, HOST, 0, cpu_devices, cache_folder, runtime_base, "shared", "none", "WARNING")


@contextlib.asynccontextmanager
async def staged(
    planned: Planned, cache_folder: Path, runtime_base: str | None, said: Callable[[str, str], None]
) -> AsyncIterator[Deployment]:
    """The started processes of a plan, on a free port and shared memory; ended when the block is left.

    `said` takes the name of a process and a line that it wrote. Raises OSError if no private folder can be made.
    """
    with runtime_folder(runtime_base) as folder:
        addresses = {name: f"unix:{folder / name}.data" for name in planned.matrix.devices}
        gateway = gateway_plan(planned.ensemble, 1, planned.sources, planned.tensors, addresses)
        plan = ensemble_plan(gateway, planned.matrix, planned.sources, row_cache_bytes=0)
        place = Place(folder, cache_folder / "models", None, HOST, 0, "WARNING")
        deployment = Deployment(planned.devices, plan, place, said)
        try:
            deployment.start()
            yield deployment
        finally:
            await deployment.stop()
