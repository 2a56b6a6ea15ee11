"""Generates the manifests of the resource from its declaration: `python -m ensemble_operator.crd [policy]` prints YAML.

The CustomResourceDefinition checks all that its structural schema and its CEL rules can see. `input` and `output`, one
mapping or a list of them, have no structural type, so no CEL rule of a CRD reaches them: a ValidatingAdmissionPolicy
(`policy`) keeps them immutable.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import yaml

from ensemble_operator.api.declaration import SPEC
from ensemble_operator.api.parsing import API_VERSION, GROUP, KIND, NAME, VERSION
from ensemble_operator.api.status import STATUS

PLURAL = "inferenceensembles"
POLICY = f"{PLURAL}.{GROUP}"
IMMUTABLE = ("input", "output")

Manifest = dict[str, object]


class _Dumper(yaml.SafeDumper):
    """YAML without anchors: a part that is used twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002  PyYAML calls it so
        """All of them."""
        return True


def definition() -> Manifest:
    """The CustomResourceDefinition."""
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["ie"],
        "categories": ["ensembles"],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.devices.count",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": _columns(),
        "schema": {"openAPIV3Schema": _schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _columns() -> list[Manifest]:
    def column(name: str, kind: str, path: str, description: str) -> Manifest:
        return {"name": name, "type": kind, "jsonPath": path, "description": description}

    ready = '.status.conditions[?(@.type=="Ready")].status'
    return [
        column("Ready", "string", ready, "Whether the ensemble answers with all its members."),
        column("Members", "string", ".status.members.summary", "Live members of all."),
        column("Devices", "string", ".status.devices.summary", "Held devices of those wanted."),
        column("Throughput", "number", ".status.throughput.predicted", "Predicted rows/s."),
        column("URL", "string", ".status.url", "Where the ensemble answers."),
        column("Age", "date", ".metadata.creationTimestamp", "Time since it was created."),
    ]


def _schema() -> Manifest:
    described = "An ensemble of DNNs: members that all see every input, and a rule that makes one answer of theirs."
    kept_version = "Version of this representation."
    return {
        "description": described,
        "type": "object",
        "required": ["metadata", "spec"],
        "properties": {
            "apiVersion": {"description": kept_version, "type": "string"},
            "kind": {"description": "Kind of this resource.", "type": "string"},
            "metadata": {"type": "object", "properties": {"name": NAME.openapi()}},
            "spec": {"description": "What is wanted.", **SPEC.openapi()},
            "status": {"description": "What is the case, as the operator last saw it.", **STATUS.openapi()},
        },
    }


def policy() -> list[Manifest]:
    """The ValidatingAdmissionPolicy that keeps the tensors immutable, and its binding."""
    validations: list[Manifest] = []
    for field in IMMUTABLE:
        given, kept = f"has(object.spec.{field})", f"object.spec.{field} == oldObject.spec.{field}"
        validations += [
            {
                "expression": f"!{given} || type(object.spec.{field}) == map || type(object.spec.{field}) == list",
                "message": f"spec.{field} must be a mapping, or a list of mappings",
            },
            {
                "expression": f"oldObject == null || !has(oldObject.spec.{field}) || ({given} && {kept})",
                "message": f"spec.{field} is immutable: clients and members rely on it; create another ensemble",
            },
        ]
    rule = {"apiGroups": [GROUP], "apiVersions": [VERSION], "operations": ["CREATE", "UPDATE"], "resources": [PLURAL]}
    spec = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": [rule]},
        "validations": validations,
    }
    binding = {"policyName": POLICY, "validationActions": ["Deny"]}
    api = "admissionregistration.k8s.io/v1"
    return [
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": POLICY}, "spec": spec},
        {"apiVersion": api, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": POLICY}, "spec": binding},
    ]


def render(*manifests: Mapping[str, object]) -> str:
    """The YAML of manifests, as it is committed."""
    head = f"# Generated from the declaration of {API_VERSION} by `make crd`; do not edit.\n"
    body = yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)
    return head + body


def main(arguments: list[str]) -> int:
    """Print what was asked for; the exit code."""
    if arguments not in ([], ["policy"]):
        sys.stderr.write("usage: python -m ensemble_operator.crd [policy]\n")
        return 2
    sys.stdout.write(render(*policy()) if arguments else render(definition()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
