"""What can go wrong between the operator and the API server, in the operator's words."""

from __future__ import annotations

from ensemble_operator.errors import EnsembleError


class ClusterError(EnsembleError):
    """Base of all that the API server, or the way to it, refuses. `reason` is one word, for conditions and metrics."""

    reason = "ClusterError"


class Forbidden(ClusterError):
    """The operator's role lacks a rule: which verb on which resource, and where."""

    reason = "Forbidden"

    def __init__(self, verb: str, group: str, resource: str, namespace: str | None, message: str) -> None:
        self.verb, self.group, self.resource, self.namespace = verb, group, resource, namespace
        where = f"in namespace {namespace!r}" if namespace else "in the whole cluster"
        super().__init__(
            f"the operator may not {verb} {resource} {where}: add to its role the rule"
            f' {{apiGroups: ["{group}"], resources: ["{resource}"], verbs: ["{verb}"]}}'
            f" (the API server says: {message})"
        )


class Refused(ClusterError):
    """An admission rule refuses an object: a quota, a policy, a webhook, the namespace's pod security level."""

    reason = "Refused"


class NotFound(ClusterError):
    """The object, its namespace or its kind is not there."""

    reason = "NotFound"


class Conflict(ClusterError):
    """The object has changed or exists already: read it again."""

    reason = "Conflict"


class Invalid(ClusterError):
    """The API server does not accept the object as it is written."""

    reason = "Invalid"


class Expired(ClusterError):
    """The history from which a watch or a list wants to go on is gone: list again."""

    reason = "Expired"


class Unauthorized(ClusterError):
    """The credentials are not accepted."""

    reason = "Unauthorized"


class NamespaceTerminating(ClusterError):
    """The namespace is being deleted: nothing can be created there any more."""

    reason = "NamespaceTerminating"


class Unavailable(ClusterError):
    """The API server cannot be reached, is overloaded or fails; it may pass."""

    reason = "ApiServerUnavailable"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LeadershipLost(ClusterError):
    """This process leads no longer and must not change anything."""

    reason = "LeadershipLost"


class NoCredentials(ClusterError):
    """There is no kubeconfig that can be read, and this is no pod."""

    reason = "NoCredentials"
