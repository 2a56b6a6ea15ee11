"""Workers that will be back in a moment: a plan without them would only be undone. Pure."""

from __future__ import annotations

from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.control.observe import Observed
from ensemble_operator.control.stepping import READY, states_of
from ensemble_operator.manifests import pool_name


def returning(ensemble: InferenceEnsemble, seen: Observed) -> tuple[str, ...]:
    """Workers with a part in the matrix whose pods are deleted or just gone, and that their StatefulSets make again.

    None where a member that is served has no other instance: then the plan is to be made without waiting.
    """
    plan, target = seen.mirror.plan, seen.mirror.target
    if plan is None or target is None:
        return ()
    present = {view.name for view in seen.workers if not view.pod.leaving}
    wanted = {
        f"{pool_name(ensemble.name, pool)}-{ordinal}"
        for pool, devices in enumerate(ensemble.pools)
        for ordinal in range(devices.count)
    }
    missing = wanted - present
    gone = tuple(worker for worker, row in target.rows.items() if row and worker in missing)
    if not gone:
        return ()
    live = {cell.version for cell, state in states_of(seen).items() if state == READY and cell.worker in present}
    return gone if all((member.name, member.digest) in live for member in plan.gateway.members) else ()
