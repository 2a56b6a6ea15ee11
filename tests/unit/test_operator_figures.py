"""From the operator's page of metrics to a benchmark's figures."""

from __future__ import annotations

from benchmarks.operator_figures import MIB, Cost, Reading, Result, read_page, table

from ensemble_operator.control.metrics import Instruments, Sources


def page(requests: dict[tuple[str, str, int], int], *results: str) -> str:
    """What the operator itself would say."""
    instruments = Instruments(started=0.0)
    for result in results:
        instruments.reconciled(result, 0.01, "Conflict" if result == "failed" else "")
    return instruments.exposition(
        Sources(
            requests=lambda: requests,
            relists=lambda: {"pods": 1},
            ensembles=lambda: (),
            queue_depth=lambda: 0,
            queue_oldest_s=lambda: 0.0,
            leads=lambda: True,
        )
    )


def test_the_operators_own_page_is_read() -> None:
    requests = {("patch", "services", 200): 3, ("get", "secrets", 404): 2, ("get", "secrets", 200): 1}
    found = read_page(page({**requests, ("list", "pods", 0): 1}, "done", "done", "failed"), 12.0)
    assert found.at_s == 12.0
    assert found.requests == {"patch services": 3, "get secrets": 3, "list pods": 1}
    assert found.refused == {"get secrets 404": 2, "list pods 0": 1}
    assert (found.reconciles, found.failed) == (3, 1)
    assert found.cpu_s > 0


def test_the_cost_between_two_readings_leaves_out_what_was_before() -> None:
    first = Reading(1.0, 0.5, 2, 1, {"get secrets": 3, "list pods": 1}, {"get secrets 404": 2})
    last = Reading(11.0, 2.0, 5, 1, {"get secrets": 3, "list pods": 2, "patch services": 4}, {"get secrets 404": 2})
    cost = Cost.between(first, last)
    assert (cost.seconds, cost.cpu_s, cost.reconciles, cost.failed) == (10.0, 1.5, 3, 0)
    assert cost.requests == {"list pods": 1, "patch services": 4}
    assert cost.refused == {}
    assert cost.total == 5
    assert list(cost.by_verb.items()) == [("patch", 4), ("list", 1)]


def test_too_much_memory_is_said_loudly() -> None:
    start = Cost(20.0, 4.0, 8, 0, {"patch services": 8}, {})
    idle = Cost(60.0, 0.3, 0, 0, {"update leases": 30}, {})

    def result(with_planning: int) -> Result:
        return Result(2, 4, 2, 0.1, (5.0, 20.0), start, idle, 1.0, 150 * MIB, with_planning, 120 * MIB, {})

    small, large = result(299 * MIB), result(300 * MIB)
    assert (small.is_within_memory, large.is_within_memory) == (True, False)
    assert "OVER THE LIMIT" in table(large)
    text = table(small)
    assert "OVER THE LIMIT" not in text
    assert "5.0 s, 12.5 s, 20.0 s" in text
    assert "8 (4.0 an ensemble)" in text
    assert "0.50 % of one core" in text
