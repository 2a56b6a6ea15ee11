"""The children of an InferenceEnsemble in a cluster, as plain dicts for server-side apply.

Pure: no I/O, no clock, no randomness; the same inputs give the same manifests in the same order, byte for byte. May
import ensemble_contract, `ensemble_operator.api` and `ensemble_operator.quantities`; nothing else of the operator.
`children` is the front door; each kind has a builder of its own for who needs one object. `keep_running` holds a pod
template as it runs, until the resource asks for another.
"""

from ensemble_operator.manifests.children import children
from ensemble_operator.manifests.contents import plan_config_map, profiles_config_map, secret
from ensemble_operator.manifests.inputs import Children, ChildSettings
from ensemble_operator.manifests.keeping import keep_running
from ensemble_operator.manifests.names import (
    COMPONENT_LABEL,
    ENSEMBLE_LABEL,
    GATEWAY,
    PLAN,
    POOL_LABEL,
    PROFILES,
    TEMPLATE,
    UPGRADE,
    WORKER,
    Manifest,
    child_name,
    labels,
    pool_name,
    selector,
    selector_text,
)
from ensemble_operator.manifests.worker import worker_tolerations

__all__ = [
    "COMPONENT_LABEL",
    "ENSEMBLE_LABEL",
    "GATEWAY",
    "PLAN",
    "POOL_LABEL",
    "PROFILES",
    "TEMPLATE",
    "UPGRADE",
    "WORKER",
    "ChildSettings",
    "Children",
    "Manifest",
    "child_name",
    "children",
    "keep_running",
    "labels",
    "plan_config_map",
    "pool_name",
    "profiles_config_map",
    "secret",
    "selector",
    "selector_text",
    "worker_tolerations",
]
