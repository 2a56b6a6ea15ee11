"""Which pods of a former template go: those that serve nothing at once, the others one after the other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from ensemble_operator.control.observe import NONE, WorkerView


def useless(workers: Iterable[WorkerView], templates: Mapping[int, str], placed: AbstractSet[str]) -> list[WorkerView]:
    """Workers of a former template with which nothing is lost. `placed` are the workers on which a plan has instances.

    `templates` has the template of each pool.
    """
    return [
        view
        for view in workers
        if _is_old(view, templates)
        and not view.holds
        and (view.pod.trouble or view.pod.unschedulable or view.name not in placed)
    ]


def next_to_empty(
    workers: Sequence[WorkerView], templates: Mapping[int, str], wanted: AbstractSet[str], replaced: AbstractSet[str]
) -> str:
    """The worker of a former template to be emptied next; "" if there is none, or one of those `wanted` is away.

    Who lacks a device is not away: it may do so for ever. But of the workers that were `replaced` none may lack one
    before another has shown that pods of the new template get theirs.
    """
    present = {view.name: view for view in workers}
    proven = any(view.holds and not _is_old(view, templates) for view in workers)
    away = replaced - present.keys()
    for name in wanted & present.keys():
        view = present[name]
        blind = view.device is not None and view.device.kind == NONE
        lacks_device = (blind or bool(view.pod.unschedulable)) and (proven or name not in replaced)
        if view.pod.leaving or not (view.holds or lacks_device):
            away |= {name}
    if away & wanted:
        return ""
    return next((view.name for view in workers if view.name in wanted and view.holds and _is_old(view, templates)), "")


def _is_old(view: WorkerView, templates: Mapping[int, str]) -> bool:
    pod = view.pod
    return not pod.leaving and pod.pool in templates and pod.template != templates[pod.pool]
