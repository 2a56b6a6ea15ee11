"""What can go wrong in a worker, in its own words: no framework's exception crosses into the loop or the admin API."""

from __future__ import annotations

import urllib.parse


def without_secrets(uri: str) -> str:
    """A URI as it may be shown: without user, password and query, where signed URLs carry their key."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class WorkerError(Exception):
    """Base of the worker's own errors."""


class DeviceUnavailable(WorkerError):
    """A device that was asked for is not there, or cannot be used the way it was asked for."""


class DeviceLost(WorkerError):
    """The device cannot be used again by this process (a sticky CUDA error): the worker must exit."""


class PlanRefused(WorkerError):
    """A plan that is older than the present one, or is another of the same generation; the message says which."""


class ModelError(WorkerError):
    """A member's model cannot be fetched, believed or loaded, or does not do what its ensemble declares.

    The message names the member, its URI and the cause; the other members of the worker are not affected. `may_pass`:
    another attempt, later, may succeed with the same plan.
    """

    kind = "model"

    def __init__(self, member: str, uri: str, cause: str, *, may_pass: bool = False) -> None:
        shown = without_secrets(uri)
        super().__init__(f"member {member!r} ({shown}): {cause}")
        self.member = member
        self.uri = shown
        self.cause = cause
        self.may_pass = may_pass


class OutOfMemory(ModelError):
    """The device's memory does not hold the member at this batch size."""

    kind = "memory"


class InvalidArchive(WorkerError):
    """A model file is damaged, is not of its format, or holds a part that would be unpickled or executed."""


class InvalidModel(WorkerError):
    """A model was loaded but does not have the inputs or outputs that were declared; the message says which differ."""
