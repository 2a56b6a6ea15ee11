"""A pod template stays as it runs until the resource asks for another: an operator upgrade alone restarts no pod.

A workload (StatefulSet or Deployment) carries, as annotations, the template that was applied, a hash of what the
resource says about it, and a hash of what makes the operator's own images be taken anew, and the Secrets that these are
pulled with: `podTemplate` and the annotation UPGRADE. With the first hash unchanged the recorded template is applied
again, whoever edited the live one; with only the second unchanged, a new template is made that keeps image and Secrets.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from ensemble_operator.manifests.names import TEMPLATE, Manifest
from ensemble_operator.manifests.pods import digest

APPLIED = "ensemble-operator.io/applied-template"
ASKED = "ensemble-operator.io/asked"
RELEASE = "ensemble-operator.io/release"
PULL_SECRETS = "imagePullSecrets"


def recorded(workload: Manifest, asked: object, release: object) -> Manifest:
    """The workload with the annotations that `keep_running` reads; `asked` and `release` are JSON."""
    return _with_template(workload, workload["spec"]["template"], {ASKED: digest(asked), RELEASE: digest(release)})


def keep_running(workload: Manifest, live: Mapping[str, Any] | None) -> Manifest:
    """The workload as it is to be applied, given the live object (None: there is none)."""
    annotations = ((live or {}).get("metadata") or {}).get("annotations") or {}
    before = _applied(annotations.get(APPLIED, ""))
    ours = workload["metadata"]["annotations"]
    if before is None or annotations.get(RELEASE) != ours[RELEASE]:
        return workload
    if annotations.get(ASKED) == ours[ASKED]:
        return _with_template(workload, before)
    template = copy.deepcopy(workload["spec"]["template"])
    template["spec"]["containers"][0]["image"] = before["spec"]["containers"][0]["image"]
    template["spec"].pop(PULL_SECRETS, None)
    if PULL_SECRETS in before["spec"]:
        template["spec"][PULL_SECRETS] = before["spec"][PULL_SECRETS]
    del template["metadata"]["annotations"][TEMPLATE]
    template["metadata"]["annotations"][TEMPLATE] = digest(template)
    return _with_template(workload, template)


def _with_template(workload: Manifest, template: Manifest, more: Mapping[str, str] | None = None) -> Manifest:
    text = json.dumps(template, separators=(",", ":"))
    metadata = workload["metadata"]
    annotations = {**metadata.get("annotations", {}), **(more or {}), APPLIED: text}
    return {
        **workload,
        "metadata": {**metadata, "annotations": annotations},
        "spec": {**workload["spec"], "template": template},
    }


def _applied(text: str) -> Manifest | None:
    """The recorded template, if it is one that a pod of ours can be made of, and is as it was recorded."""
    try:
        template = json.loads(text)
        said = template["metadata"]["annotations"].pop(TEMPLATE)
        whole = bool(template["spec"]["containers"][0]["image"]) and said == digest(template)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    template["metadata"]["annotations"][TEMPLATE] = said
    return template if whole else None
