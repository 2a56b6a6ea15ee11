"""What the manifests are made of: the resource, its uid, the operator's settings, and what reconciling has decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ensemble_operator.api import Devices, InferenceEnsemble


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What the operator's own settings decide about the children.

    `operator_namespace`: from where the admin APIs may be reached; empty: from everywhere, for an operator that runs
    outside of the cluster. `listen_on` is the address that pods bind: `0.0.0.0`, or `[::]` where pods have IPv6 only.
    `image_pull_secrets` are Secrets of the ensemble's namespace; pods get them before those that `podTemplate` names.
    """

    worker_image: str
    gateway_image: str
    image_pull_policy: str = "IfNotPresent"
    operator_namespace: str = ""
    listen_on: str = "0.0.0.0"  # noqa: S104  a pod has an address of its own, and NetworkPolicies
    image_pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Children:
    """The inputs of `children`.

    `replicas`: the wanted workers of each pool, `devices` first. The contents of the two Secrets are text by file
    name; None leaves the Secrets out. `plan` is the JSON of an EnsemblePlan; None leaves the ConfigMap out, whose
    content is then somebody else's business. The same for `profiles`, text by key.
    """

    ensemble: InferenceEnsemble
    uid: str
    settings: ChildSettings
    replicas: tuple[int, ...]
    worker_secret: Mapping[str, str] | None = None
    gateway_secret: Mapping[str, str] | None = None
    plan: str | None = None
    plan_annotations: Mapping[str, str] | None = None
    profiles: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        """Check that every pool has its count."""
        pools = len(self.pools)
        if len(self.replicas) != pools:
            raise ValueError(f"replicas: {len(self.replicas)} counts for {pools} pools of {self.ensemble.name}")

    @property
    def pools(self) -> tuple[Devices, ...]:
        """Pool 0 is `devices`, those from 1 are `extraDevices`."""
        return self.ensemble.pools


@dataclass(frozen=True, slots=True)
class Claims:
    """What the members' sources reach in the namespace, sorted: PersistentVolumeClaims, and Secrets of credentials."""

    volumes: tuple[str, ...]
    secrets: tuple[str, ...]

    @staticmethod
    def of(ensemble: InferenceEnsemble) -> Claims:
        """What every worker of an ensemble mounts: any worker may be given any member."""
        models = [member.model for member in ensemble.spec.members]
        parts = [urlsplit(model.uri) for model in models]
        volumes = {part.netloc for part in parts if part.scheme == "pvc"}
        secrets = {model.credentials_secret for model in models if model.credentials_secret}
        return Claims(tuple(sorted(volumes)), tuple(sorted(secrets)))
