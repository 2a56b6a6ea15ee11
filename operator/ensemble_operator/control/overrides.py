"""What an ensemble asks for beyond its own objects, and what of it the operator's settings refuse. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ensemble_operator.api import InferenceEnsemble, InvalidSpec, Problem

# Parts of a pod through which it reaches more than itself: Secrets, volumes and service accounts of its namespace,
# Services and injectors that select it, pods that make room for it, and another way to run. By their keys.
REACHING = {
    "image": "image",
    "env": "env",
    "volumes": "volumes",
    "volume_mounts": "volumeMounts",
    "image_pull_secrets": "imagePullSecrets",
    "labels": "labels",
    "annotations": "annotations",
    "priority_class_name": "priorityClassName",
    "runtime_class_name": "runtimeClassName",
}
_REFUSED = (
    "reaches beyond the ensemble, and the operator's setting allowOverrides is off: remove it, or have the operator"
    " installed with allowOverrides=true"
)
_LISTED_LABELS = "names a file, which the operator does not read: list the class names"


def check_allowed(ensemble: InferenceEnsemble, *, allow_overrides: bool) -> None:
    """Check what a cluster demands of a valid resource.

    Raises InvalidSpec with the path of each field that is refused.
    """
    problems = [Problem(path, _LISTED_LABELS) for path in _labels_in_files(ensemble)]
    if not allow_overrides:
        problems += [Problem(path, _REFUSED) for path in _overrides(ensemble)]
    if problems:
        raise InvalidSpec(problems)


def remarks(ensemble: InferenceEnsemble) -> str:
    """What the resource asks for that is not done yet, in words; empty if it is all done."""
    said = []
    autoscaling = ensemble.spec.autoscaling
    if autoscaling is not None:
        said.append(
            f"spec.autoscaling is not acted upon yet: {autoscaling.min_devices} devices are held"
            " (kubectl scale and a HorizontalPodAutoscaler work on spec.devices.count)"
        )
    if ensemble.spec.planning.evaluate == "live":
        said.append("spec.planning.evaluate is taken for model: a cluster's plans are not tried live")
    return "; ".join(said)


def _labels_in_files(ensemble: InferenceEnsemble) -> Iterator[str]:
    for output, labels in ensemble.spec.labels.items():
        if isinstance(labels, str):
            yield f"spec.output[{output}].labels"


def _overrides(ensemble: InferenceEnsemble) -> Iterator[str]:
    for role in ("worker", "gateway"):
        overrides = getattr(ensemble.spec.pod_template, role)
        for part, key in REACHING.items():
            if getattr(overrides, part):
                yield f"spec.podTemplate.{role}.{key}"
    for index, member in enumerate(ensemble.spec.members):
        if member.model.uri.startswith("pvc://"):
            yield f"spec.members[{index}].model.uri"
        if member.model.credentials_secret:
            yield f"spec.members[{index}].model.credentialsSecret"
