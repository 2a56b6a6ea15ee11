"""Children that hold something: the plan's and the profiles' ConfigMaps, Secrets, and ServiceAccounts."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from ensemble_contract.pod import PLAN_FILE
from ensemble_operator.api import InferenceEnsemble
from ensemble_operator.manifests.names import PLAN, PROFILES, Manifest, child_name, metadata


def plan_config_map(
    ensemble: InferenceEnsemble, uid: str, plan: str, annotations: Mapping[str, str] | None = None
) -> Manifest:
    """The mirror from which every pod can start by itself: the JSON of an EnsemblePlan."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, PLAN), PLAN, annotations=annotations),
        "data": {PLAN_FILE: plan},
    }


def profiles_config_map(
    ensemble: InferenceEnsemble, uid: str, profiles: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> Manifest:
    """What was measured, kept for a restarted operator."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, PROFILES), PROFILES, annotations=annotations),
        "data": dict(profiles),
    }


def secret(ensemble: InferenceEnsemble, uid: str, component: str, contents: Mapping[str, str]) -> Manifest:
    """What a component's pods prove themselves with: files as `ensemble_contract.keys` names them, and the token."""
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in sorted(contents.items())}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, component), component),
        "type": "Opaque",
        "data": encoded,
    }


def service_account(ensemble: InferenceEnsemble, uid: str, component: str) -> Manifest:
    """An account without rights and without a token: pods never talk to the API server."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(ensemble, uid, child_name(ensemble.name, component), component),
        "automountServiceAccountToken": False,
    }
