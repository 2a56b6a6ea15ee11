"""The resource InferenceEnsemble: its types, its parser, and the declaration that the CRD is generated from.

Pure: no I/O, no Kubernetes client. May import ensemble_contract, `ensemble_operator.errors`, `.quantities`, and PyYAML
(in `parsing`). `declaration` says every field once; `schema` and `structure` are the words it is said in.
"""

from ensemble_operator.api.ensemble import (
    Autoscaling,
    Batching,
    Combine,
    Devices,
    Gateway,
    InferenceEnsemble,
    Measurement,
    Member,
    ModelRef,
    Planning,
    PodOverrides,
    PodTemplate,
    Spec,
    Transport,
)
from ensemble_operator.api.identity import ensemble_digest, member_digest
from ensemble_operator.api.parsing import API_VERSION, GROUP, KIND, VERSION, cluster_only, parse
from ensemble_operator.api.yamltext import parse_yaml
from ensemble_operator.errors import InvalidSpec, Problem

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "VERSION",
    "Autoscaling",
    "Batching",
    "Combine",
    "Devices",
    "Gateway",
    "InferenceEnsemble",
    "InvalidSpec",
    "Measurement",
    "Member",
    "ModelRef",
    "Planning",
    "PodOverrides",
    "PodTemplate",
    "Problem",
    "Spec",
    "Transport",
    "cluster_only",
    "ensemble_digest",
    "member_digest",
    "parse",
    "parse_yaml",
]
