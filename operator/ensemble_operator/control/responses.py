"""From an answer of the API server to a domain error. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from ensemble_operator.control.errors import (
    ClusterError,
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    NamespaceTerminating,
    NotFound,
    Refused,
    Unauthorized,
    Unavailable,
)
from ensemble_operator.control.kinds import Kind

MAX_SHOWN = 2_000
# Refusals by RBAC; every other 403 is an admission rule's. The verb is the server's word: server-side apply needs
# `create`, too, where the object is new.
_RBAC = re.compile(r'cannot (\w+) resource "([^"]+)" in API group "([^"]*)"')
# Server-side apply answers with 500 to what the schema does not know, and to values that its types cannot hold.
_NEVER_VALID = re.compile(r"failed to (create typed patch object|convert new object)|unable to convert unstructured")
# An admission webhook that does not answer, and whose failure policy is Fail, is a 500, too.
_WEBHOOK = "failed calling webhook"


@dataclass(frozen=True, slots=True)
class Call:
    """One request as RBAC and metrics see it."""

    verb: str
    kind: Kind
    namespace: str | None = None
    name: str | None = None
    subresource: str | None = None

    @property
    def resource(self) -> str:
        """`pods`, `inferenceensembles/status`."""
        return f"{self.kind.plural}/{self.subresource}" if self.subresource else self.kind.plural

    def __str__(self) -> str:
        where = "/".join(part for part in (self.namespace, self.name) if part)
        return f"{self.verb} {self.resource} {where}".strip()


def error_of(call: Call, code: int, body: bytes, retry_after_s: float | None = None) -> ClusterError:
    """What an answer of 400 and above means."""
    status = _status(body)
    message = str(status.get("message") or body[:MAX_SHOWN].decode(errors="replace") or f"HTTP {code}")[:MAX_SHOWN]
    reason = str(status.get("reason", ""))
    text = f"{call}: {message}"
    if code == 403:
        if _is_terminating(status):
            return NamespaceTerminating(text)
        refused = _RBAC.search(message)
        if refused is None:
            return Refused(text)
        verb, resource, group = refused.groups()
        return Forbidden(verb, group, resource, call.namespace, message)
    if code == 500 and _WEBHOOK in message:
        return Refused(text)
    if (code == 429 or code >= 500) and not _NEVER_VALID.search(message):
        return Unavailable(text, retry_after_s)
    if code == 410 or reason in ("Expired", "Gone"):
        return Expired(text)
    by_code: dict[int, type[ClusterError]] = {401: Unauthorized, 404: NotFound, 409: Conflict}
    return by_code.get(code, Invalid)(text)


def may_pass(code: int) -> bool:
    """Whether the same request may succeed in a moment."""
    return code == 429 or code in (500, 502, 503, 504)


def _status(body: bytes) -> dict[str, Any]:
    try:
        status = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return status if isinstance(status, dict) else {}


def _is_terminating(status: dict[str, Any]) -> bool:
    causes = (status.get("details") or {}).get("causes") or ()
    return any(cause.get("reason") == "NamespaceTerminating" for cause in causes)
