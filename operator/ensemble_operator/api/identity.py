"""Digests: the identity of what answers, for caches, plans and statuses. Pure."""

from __future__ import annotations

import hashlib
import json

from ensemble_operator.api.ensemble import InferenceEnsemble, Member

DIGEST_LENGTH = 16


def member_digest(member: Member) -> str:
    """Sixteen hex digits that change whenever the member's file, its version, format or activation do."""
    model = member.model
    return _digest([model.uri, model.sha256, model.version, member.format, member.activation])


def ensemble_digest(ensemble: InferenceEnsemble) -> str:
    """Sixteen hex digits that change whenever what the ensemble answers does: its members, weights, rule or tensors."""
    spec = ensemble.spec
    members = [[member.name, member_digest(member), member.weight] for member in spec.members]
    tensors = [[[t.name, t.datatype, list(t.shape)] for t in side] for side in (spec.inputs, spec.outputs)]
    return _digest([members, tensors, spec.combine.rule])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()[:DIGEST_LENGTH]
