"""Which pods of a former template go, and when the next one is emptied."""

from __future__ import annotations

import pytest

from ensemble_operator.control.observe import WorkerView
from ensemble_operator.control.replacing import next_to_empty, useless
from ensemble_operator.fleet import DeviceReport
from tests.unit.control.ensembles import pod, worker

OLD, NEW = "t1", "t2"
TEMPLATES = {0: NEW}
NAMES = [f"tiny-worker-{n}" for n in range(3)]
NO_GPU = "0/1 nodes have a free nvidia.com/gpu"


def held(n: int, template: str = OLD) -> WorkerView:
    return worker(NAMES[n], pod=pod(NAMES[n], template=template))


def away(n: int, template: str = NEW, **changes: object) -> WorkerView:
    found = pod(NAMES[n], template=template, ready=False, **changes)
    return worker(NAMES[n], pod=found, device=None, report=None)


def waiting(n: int, template: str = NEW) -> WorkerView:
    return away(n, template, unschedulable=NO_GPU)


def blind(n: int) -> WorkerView:
    device = DeviceReport("cuda-0", "none", "", 0, error="no GPU")
    return worker(NAMES[n], pod=pod(NAMES[n], template=NEW), device=device)


@pytest.mark.parametrize(
    ("workers", "replaced", "expected"),
    [
        ([held(0), held(1), held(2)], [], NAMES[0]),
        ([held(0, NEW), held(1), held(2)], [0], NAMES[1]),
        ([held(0, NEW), held(1, NEW), held(2, NEW)], [0, 1, 2], ""),
        # Fewer devices than are wanted, as there may be for ever.
        ([held(0), held(1), waiting(2)], [], NAMES[0]),
        ([waiting(0), held(1), held(2, NEW)], [0], NAMES[1]),
        ([held(0), held(1)], [], NAMES[0]),
        ([blind(0), held(1), held(2)], [], NAMES[1]),
        # Never two at a time.
        ([held(1), held(2)], [0], ""),
        ([away(0), held(1), held(2)], [0], ""),
        ([away(0, OLD), held(1), held(2)], [], ""),
        ([away(0, OLD, leaving_since=1.0), held(1), held(2)], [], ""),
        ([away(0, trouble="ImagePullBackOff"), held(1), held(2)], [0], ""),
        # Nobody can place pods of the new template.
        ([waiting(0), held(1), held(2)], [0], ""),
        ([waiting(0), held(1), waiting(2)], [0], ""),
        ([blind(0), held(1), held(2)], [0], ""),
    ],
)
def test_the_next_is_emptied_while_none_is_away_for_it(
    workers: list[WorkerView], replaced: list[int], expected: str
) -> None:
    assert next_to_empty(workers, TEMPLATES, set(NAMES), {NAMES[n] for n in replaced}) == expected


def test_those_that_are_wanted_no_more_are_not_replaced() -> None:
    assert next_to_empty([held(0, NEW), held(1)], TEMPLATES, {NAMES[0]}, set()) == ""
    assert next_to_empty([held(0)], {}, set(NAMES), set()) == ""


def test_old_pods_with_which_nothing_is_lost_go_at_once() -> None:
    starting = away(0, OLD)
    workers = [starting, waiting(1, OLD), away(2, OLD, trouble="CrashLoopBackOff")]
    placed = {view.name for view in workers}
    assert useless(workers, TEMPLATES, set()) == workers
    assert useless(workers, TEMPLATES, placed) == workers[1:]
    assert useless([held(0), held(1, NEW), waiting(2)], TEMPLATES, set()) == []
