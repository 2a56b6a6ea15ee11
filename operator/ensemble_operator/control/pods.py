"""What the operator reads from a pod. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_operator.control.times import unix_time
from ensemble_operator.manifests import COMPONENT_LABEL, POOL_LABEL, TEMPLATE

Manifest = Mapping[str, Any]

# The kubelet had its time, and some more, to say that the pod is gone.
UNREACHABLE_AFTER_S = 15.0
# A new pod for which a plan waits: an image's download may take longer, and then the plan is made without it.
COMING_S = 60.0
# Reasons for which a container does not start, as kubelets give them.
_CANNOT_START = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CrashLoopBackOff",
    }
)


@dataclass(frozen=True, slots=True)
class Pod:
    """A worker's or a gateway's pod.

    `life` changes whenever its container starts anew. `away_since` is when it stopped being Ready (Unix time), None
    while it is. `trouble` says why it does not start; `unschedulable` quotes the scheduler. `abandoned`: evicted by a
    taint of its node when it had ceased to be Ready before, as the pods of a node do that is gone.
    """

    name: str
    uid: str
    component: str
    pool: int
    ordinal: int
    ip: str
    node: str
    template: str
    life: str
    ready: bool
    created: float
    away_since: float | None
    leaving_since: float | None
    trouble: str = ""
    unschedulable: str = ""
    abandoned: bool = False

    def is_coming(self, now: float) -> bool:
        """Whether it may soon be there: it is new, and neither its node nor the scheduler objects."""
        return not (self.leaving or self.trouble or self.unschedulable) and now - self.created < COMING_S

    @property
    def host(self) -> str:
        """Its address as URLs have it."""
        return f"[{self.ip}]" if ":" in self.ip else self.ip

    @property
    def leaving(self) -> bool:
        """Whether it is being deleted."""
        return self.leaving_since is not None

    def is_stuck(self, now: float) -> bool:
        """Whether it should be gone, and nobody on its node has removed it."""
        if self.leaving_since is None:
            return False
        return self.abandoned or now > self.leaving_since + UNREACHABLE_AFTER_S


def read_pods(manifests: Iterable[Manifest], component: str) -> tuple[Pod, ...]:
    """The pods of a component, by pool and ordinal; those that have ended are left out."""
    pods = [read_pod(m) for m in manifests if m["metadata"].get("labels", {}).get(COMPONENT_LABEL) == component]
    return tuple(sorted((p for p in pods if p is not None), key=lambda p: (p.pool, p.ordinal, p.name)))


def read_pod(manifest: Manifest) -> Pod | None:
    """A pod; None if its containers have ended for good."""
    metadata, spec, status = manifest["metadata"], manifest.get("spec", {}), manifest.get("status", {})
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    ready, scheduled = conditions.get("Ready", {}), conditions.get("PodScheduled", {})
    containers = status.get("containerStatuses") or ()
    first: Manifest = containers[0] if containers else {}
    ordinal = re.search(r"-(\d+)$", metadata["name"])
    pool = labels.get(POOL_LABEL, "0")
    is_ready = ready.get("status") == "True"
    return Pod(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        component=labels.get(COMPONENT_LABEL, ""),
        pool=int(pool) if pool.isdigit() else 0,
        ordinal=int(ordinal[1]) if ordinal else 0,
        ip=status.get("podIP", ""),
        node=spec.get("nodeName", ""),
        template=annotations.get(TEMPLATE, ""),
        life=f"{metadata.get('uid', '')} {first.get('restartCount', 0)} {first.get('containerID', '')}",
        ready=is_ready,
        created=unix_time(metadata.get("creationTimestamp")),
        away_since=None
        if is_ready
        else unix_time(ready.get("lastTransitionTime") or metadata.get("creationTimestamp")),
        leaving_since=unix_time(metadata["deletionTimestamp"]) if metadata.get("deletionTimestamp") else None,
        trouble=_trouble(first),
        unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
        abandoned=_is_abandoned(ready, conditions.get("DisruptionTarget", {})),
    )


def _is_abandoned(ready: Manifest, disruption: Manifest) -> bool:
    if (disruption.get("status"), disruption.get("reason")) != ("True", "DeletionByTaintManager"):
        return False
    away, evicted = (unix_time(condition.get("lastTransitionTime")) for condition in (ready, disruption))
    return ready.get("status") != "True" and away < evicted


def _trouble(container: Manifest) -> str:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason = waiting.get("reason", "")
    if reason not in _CANNOT_START:
        return ""
    ended = (container.get("lastState") or {}).get("terminated") or {}
    cause = waiting.get("message") or ""
    if ended.get("message"):
        cause = f"{cause}: {ended['message']}"
    return f"{reason}: {cause}".rstrip(": ")[:1_000]
