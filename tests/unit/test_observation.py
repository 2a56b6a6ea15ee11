"""How far a start has come, as a table of what workers and gateway say."""

import pytest

from ensemble_operator.fleet import GatewayState, InstanceReport, MemberState, WorkerReport
from ensemble_operator.serve.observation import Observed, Rates, progress, rates, worker_state

MEMBERS = ("a", "b")
PLACED = {"a": ("w0", "w1"), "b": ("w1",)}


def worker(**states: str) -> WorkerReport:
    """A worker whose instances are in these states; a failed one says why."""
    return WorkerReport(
        1,
        tuple(
            InstanceReport(name, "d", 8, state, f"{name} is broken" if state == "failed" else None)
            for name, state in states.items()
        ),
    )


def gateway(*live: str) -> GatewayState:
    return GatewayState(1, True, "http://h:1", tuple(MemberState(name, name in live) for name in MEMBERS))


READY = {"w0": worker(a="ready"), "w1": worker(a="ready", b="ready")}

TABLE = [
    ("nothing answers", Observed(None, {}, {}), {}, ("a", "b"), ()),
    ("workers are ready, the gateway is not there", Observed(None, READY, {}), {}, ("a", "b"), ()),
    ("the gateway has seen one", Observed(gateway("a"), READY, {}), {}, ("b",), ("a",)),
    ("all live", Observed(gateway("a", "b"), READY, {}), {}, (), ("a", "b")),
    (
        "failed on one of two: still awaited",
        Observed(gateway(), {"w0": worker(a="failed"), "w1": worker(a="loading", b="loading")}, {}),
        {},
        ("a", "b"),
        (),
    ),
    (
        "failed everywhere",
        Observed(gateway("b"), {"w0": worker(a="failed"), "w1": worker(a="failed", b="ready")}, {}),
        {"a": "a is broken"},
        (),
        ("b",),
    ),
    (
        "a worker that is given up takes its members along",
        Observed(gateway("a"), {"w0": worker(a="ready"), "w1": None}, {"w1": "worker w1 was ended by SIGSEGV"}),
        {"b": "worker w1 was ended by SIGSEGV"},
        (),
        ("a",),
    ),
    (
        "live through one worker while it failed on the other",
        Observed(gateway("a", "b"), {"w0": worker(a="failed"), "w1": worker(a="ready", b="ready")}, {}),
        {},
        (),
        ("a", "b"),
    ),
]


@pytest.mark.parametrize(
    ("observed", "failed", "pending", "live"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_progress(observed: Observed, failed: dict[str, str], pending: tuple[str, ...], live: tuple[str, ...]) -> None:
    state = progress(MEMBERS, PLACED, {}, observed)
    assert (state.failed, state.pending, state.live) == (failed, pending, live)
    assert state.settled == (not pending)


def test_a_member_that_was_never_placed_is_not_awaited() -> None:
    placed = {"a": ("w0",)}
    observed = Observed(gateway("a"), {"w0": worker(a="ready")}, {})
    state = progress(MEMBERS, placed, {"b": "no such file"}, observed)
    assert state.settled
    assert state.failed == {"b": "no such file"}


@pytest.mark.parametrize(
    ("report", "running", "given_up", "state"),
    [
        (None, True, False, "starting"),
        (None, False, False, "restarting"),
        (None, False, True, "given up"),
        (worker(), True, False, "idle"),
        (worker(a="ready", b="loading"), True, False, "loading"),
        (worker(a="fetching", b="loading"), True, False, "fetching"),
        (worker(a="ready", b="failed"), True, False, "failed"),
        (worker(a="ready", b="ready"), True, False, "ready"),
    ],
)
def test_worker_state(report: WorkerReport | None, running: bool, given_up: bool, state: str) -> None:
    assert worker_state(report, running=running, given_up=given_up) == state


BOUNDS = (0.01, 0.02, 0.04)


def counted(rows: int, requests: int, *durations: int) -> GatewayState:
    return GatewayState(
        *(1, True, "http://h:1"), rows=rows, requests=requests, duration_bounds_s=BOUNDS, duration_counts=durations
    )


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (counted(100, 10, 10, 0, 0, 0), counted(300, 20, 10, 5, 5, 0), Rates(100.0, 0.02, 0.0396)),
        (counted(100, 10, 10, 0, 0, 0), counted(100, 10, 10, 0, 0, 0), Rates(0.0)),
        (counted(0, 0), counted(4, 4, 4, 0, 0, 0), Rates(2.0, 0.005, 0.0099)),
        (counted(0, 0, 0, 0, 0, 0), counted(4, 4, 0, 0, 0, 4), Rates(2.0, 0.04, 0.04)),
        (None, counted(5, 5, 5, 0, 0, 0), Rates()),
        (counted(5, 5, 5, 0, 0, 0), None, Rates()),
        (counted(500, 50, 50, 0, 0, 0), counted(3, 1, 1, 0, 0, 0), Rates()),
    ],
    ids=["traffic", "quiet", "no plan before", "off the scale", "first look", "gateway away", "gateway restarted"],
)
def test_rates(before: GatewayState | None, now: GatewayState | None, expected: Rates) -> None:
    found = rates(before, now, 2.0)
    assert found.rows_per_s == expected.rows_per_s
    assert found.p50_s == pytest.approx(expected.p50_s)
    assert found.p99_s == pytest.approx(expected.p99_s)
