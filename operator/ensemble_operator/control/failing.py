"""Members that fail: from the first failure until their version has run, whatever is tried in between. Pure.

A version that fails is tried again after a while, and nobody is to be told the same at every attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ensemble_operator.control.observe import WorkerView
from ensemble_operator.control.planning import Members
from ensemble_operator.control.target import Target

# A member's name and the digest of its version.
Version = tuple[str, str]


def failing(
    workers: Iterable[WorkerView], members: Members | None, wanted: Mapping[str, str], before: Mapping[Version, str]
) -> dict[Version, str]:
    """Versions that cannot be loaded, fail somewhere, or failed and have not run since; with the cause.

    `wanted` has the digest of each member as the resource asks for it, `before` what this found the last time.
    """
    instances = [(view, i) for view in workers if view.report is not None for i in view.report.instances]
    ready = {(i.member, i.digest) for _, i in instances if i.state == "ready"}
    found = {version: cause for version, cause in before.items() if version in wanted.items() and version not in ready}
    for view, i in instances:
        if i.state == "failed":
            found[i.member, i.digest] = f"on {view.name}: {i.error or 'no reason given'}"
    unloaded = members.failed if members is not None else {}
    return found | {(name, wanted[name]): cause for name, cause in unloaded.items() if name in wanted}


def matrix_key(target: Target) -> int:
    """The same for matrices of the same instances."""
    return hash((frozenset(target.cells()), target.digests))
