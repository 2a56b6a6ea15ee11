"""Errors of the contract: something that crossed a process border cannot be believed."""

from __future__ import annotations


class ContractError(Exception):
    """Base of the errors that a peer's bytes can cause."""


class ProtocolError(ContractError):
    """A wire message is malformed: wrong magic, version, type, length or bounds."""


class InvalidPlan(ContractError):
    """A plan cannot be decoded or contradicts itself; the message names the field."""


class PlanTooLarge(InvalidPlan):
    """A plan, or what is kept beside it, is larger than a ConfigMap can hold."""
