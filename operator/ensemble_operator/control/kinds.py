"""The kinds of Kubernetes objects that the operator knows, their paths in the API, and keys of ensembles. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ensemble_operator.control.errors import Invalid
from ensemble_operator.manifests import names

Manifest = dict[str, Any]
Manifests = list[Manifest]

MANAGED_BY = names.MANAGED_BY_LABEL
FIELD_MANAGER = names.MANAGER
ENSEMBLE_LABEL = names.ENSEMBLE_LABEL
CHILDREN_SELECTOR = f"{MANAGED_BY}={FIELD_MANAGER}"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Which InferenceEnsemble: its namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object: enough to address it without asking the API server what it serves."""

    name: str
    group: str
    version: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As manifests have it: `v1`, `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """The path of one object, of a namespace's objects, or of all."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        inside = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return "/".join(part for part in (f"{root}{inside}", self.plural, name, subresource) if part)

    def __str__(self) -> str:
        return self.name


ENSEMBLE = Kind("InferenceEnsemble", "ensemble-operator.io", "v1alpha1", "inferenceensembles")
STATEFUL_SET = Kind("StatefulSet", "apps", "v1", "statefulsets")
DEPLOYMENT = Kind("Deployment", "apps", "v1", "deployments")
SERVICE = Kind("Service", "", "v1", "services")
CONFIG_MAP = Kind("ConfigMap", "", "v1", "configmaps")
POD = Kind("Pod", "", "v1", "pods")
SECRET = Kind("Secret", "", "v1", "secrets")
SERVICE_ACCOUNT = Kind("ServiceAccount", "", "v1", "serviceaccounts")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies")
DISRUPTION_BUDGET = Kind("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets")
CLAIM_TEMPLATE = Kind("ResourceClaimTemplate", "resource.k8s.io", "v1", "resourceclaimtemplates")
RESOURCE_CLAIM = Kind("ResourceClaim", "resource.k8s.io", "v1", "resourceclaims")
RESOURCE_SLICE = Kind("ResourceSlice", "resource.k8s.io", "v1", "resourceslices", namespaced=False)
NODE = Kind("Node", "", "v1", "nodes", namespaced=False)
NAMESPACE = Kind("Namespace", "", "v1", "namespaces", namespaced=False)
LEASE = Kind("Lease", "coordination.k8s.io", "v1", "leases")
EVENT = Kind("Event", "events.k8s.io", "v1", "events")

KINDS = (
    ENSEMBLE,
    STATEFUL_SET,
    DEPLOYMENT,
    SERVICE,
    CONFIG_MAP,
    POD,
    SECRET,
    SERVICE_ACCOUNT,
    NETWORK_POLICY,
    DISRUPTION_BUDGET,
    CLAIM_TEMPLATE,
    RESOURCE_CLAIM,
    RESOURCE_SLICE,
    NODE,
    NAMESPACE,
    LEASE,
    EVENT,
)
# Children that are followed by a watch. Secrets are not: who may watch them reads all of them.
WATCHED = (
    STATEFUL_SET,
    DEPLOYMENT,
    SERVICE,
    CONFIG_MAP,
    POD,
    SERVICE_ACCOUNT,
    NETWORK_POLICY,
    DISRUPTION_BUDGET,
    CLAIM_TEMPLATE,
)
# Not served by every cluster that we support.
OPTIONAL = frozenset({CLAIM_TEMPLATE, RESOURCE_CLAIM, RESOURCE_SLICE})

_BY_NAME = {(kind.api_version, kind.name): kind for kind in KINDS}


def kind_of(manifest: Manifest) -> Kind:
    """The kind of a manifest.

    Raises Invalid if the operator does not know it.
    """
    named = (str(manifest.get("apiVersion", "")), str(manifest.get("kind", "")))
    try:
        return _BY_NAME[named]
    except KeyError:
        raise Invalid(f"{' '.join(named).strip() or 'a manifest without a kind'} is not a kind that is known") from None


def key_of(manifest: Manifest) -> Key:
    """The key of an InferenceEnsemble."""
    return Key(manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"])


def owner_of(manifest: Manifest) -> Key | None:
    """The ensemble that a child belongs to, by its label; None if it has none."""
    metadata = manifest["metadata"]
    name = (metadata.get("labels") or {}).get(ENSEMBLE_LABEL)
    return Key(metadata.get("namespace", ""), name) if name else None
