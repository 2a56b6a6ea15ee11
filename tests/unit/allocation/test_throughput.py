"""The linear program: known answers, its bound from prices, and the neighbours that prices rule out."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from ensemble_operator.allocation.errors import DoesNotFit
from ensemble_operator.allocation.greedy import Trace, _best_neighbour, _Point
from ensemble_operator.allocation.layout import Layout, layout_of, line_rates, matrix_of
from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.moves import Surroundings, together
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile
from ensemble_operator.allocation.tables import Floats, Tables
from ensemble_operator.allocation.throughput import earnings, rows_per_s, solve, time_limits, times_of
from ensemble_operator.allocation.worstfit import fill, worst_fit
from tests.unit.allocation.problems import MIB, far_apart, problems, random_problem

# Searches and programs: seconds of computing, which may be minutes on a machine that is busy.
pytestmark = pytest.mark.timeout(600)


def small(rates: dict[str, float], devices: int, colocation: float = 1.0) -> Problem:
    profiles = tuple(Profile(m, "gpu", 1, rate, 1 / rate, MIB) for m, rate in rates.items())
    specs = tuple(DeviceSpec(f"d{i}", "gpu", "cuda", 100 * MIB) for i in range(devices))
    return Problem(tuple(map(Member, rates)), specs, profiles, (1,), colocation={"gpu": colocation})


@pytest.mark.parametrize(
    ("rates", "colocation", "sizes", "expected"),
    [
        ({"a": 100.0}, 1.0, [[1]], 100.0),
        ({"a": 100.0}, 1.0, [[1], [1], [0]], 200.0),
        ({"a": 100.0, "b": 100.0}, 1.0, [[1, 1]], 50.0),
        ({"a": 100.0, "b": 50.0}, 1.0, [[1, 0], [0, 1]], 50.0),
        # The second device is shared so that a gets 1/3 of it: 100 f = 50, ... a: 100, b: 50 (1 - f) + 50.
        ({"a": 100.0, "b": 50.0}, 1.0, [[1, 1], [0, 1]], 200 / 3),
        ({"a": 100.0, "b": 100.0}, 0.8, [[1, 1]], 40.0),
        ({"a": 100.0, "b": 100.0}, 1.5, [[1, 1]], 75.0),
        ({"a": 100.0, "b": 100.0}, 9.0, [[1, 1]], 100.0),
        ({"a": 100.0}, 0.5, [[1]], 100.0),
    ],
)
def test_known_answers(rates: dict[str, float], colocation: float, sizes: list[list[int]], expected: float) -> None:
    problem = small(rates, len(sizes), colocation)
    assert rows_per_s(problem, Matrix.of(problem, sizes)) == pytest.approx(expected)


def test_an_infeasible_matrix_is_worth_nothing() -> None:
    problem = small({"a": 1.0, "b": 1.0}, 1)
    assert rows_per_s(problem, Matrix.of(problem, [[1, 0]])) == 0.0
    assert rows_per_s(problem, Matrix.of(problem, [[1, 7]])) == 0.0


def reference(problem: Problem, matrix: Matrix) -> float:
    """The program as the textbook has it: one variable a cell, nothing merged, nothing in closed form."""
    rate = {(p.member, p.device_class, p.batch_size): p.rows_per_s for p in problem.profiles}
    cells = list(matrix.cells())
    kind = {d.name: d.device_class for d in problem.devices}
    system, right = [], []
    for member in problem.members:
        system.append(
            [-rate[c.member, kind[c.device], c.batch_size] * (c.member == member.name) for c in cells] + [1.0]
        )
        right.append(0.0)
    for device in problem.devices:
        on = [float(c.device == device.name) for c in cells]
        system.append([*on, 0.0])
        right.append(problem.colocation.get(device.device_class, 1.0) if sum(on) > 1 else 1.0)
    found = linprog([0.0] * len(cells) + [-1.0], A_ub=system, b_ub=right, bounds=[(0, 1)] * len(cells) + [(0, None)])
    return float(-found.fun)


def bound_by_prices(tables: Tables, layout: Layout, prices: Floats) -> float:
    """A throughput that the layout cannot exceed, from any prices that sum to 1."""
    pools, levels, counts = layout.arrays()
    rates = line_rates(tables, pools, levels)
    return float(counts @ earnings(rates, time_limits(tables, pools, rates), prices))


def some_matrix(problem: Problem, seed: int) -> Matrix | None:
    """A feasible matrix that no rule made: the filled one with random instances taken away."""
    try:
        matrix = fill(problem, worst_fit(problem))
    except DoesNotFit:
        return None
    draw = np.random.default_rng(seed)
    for device, member in draw.permutation(np.argwhere(matrix.sizes)):
        without = matrix.with_cell(int(device), int(member), 0)
        if without.sizes[:, member].any() and draw.random() < 0.5:
            matrix = without
    return matrix


@given(problems(), st.integers(0, 1000), st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_merged_lines_and_closed_forms_equal_the_textbook(problem: Problem, seed: int, price_seed: int) -> None:
    matrix = some_matrix(problem, seed)
    if matrix is None:
        return
    layout = layout_of(problem, matrix)
    solution = solve(problem.tables, layout)
    expected = reference(problem, matrix)
    assert solution.rows_per_s == pytest.approx(expected, rel=1e-6)
    assert solution.prices.sum() == pytest.approx(1)
    assert bound_by_prices(problem.tables, layout, solution.prices) == pytest.approx(expected, rel=1e-5)
    anything = np.random.default_rng(price_seed).dirichlet(np.ones(len(problem.members)))
    assert bound_by_prices(problem.tables, layout, anything) >= expected * (1 - 1e-9)
    assert layout_of(problem, matrix_of(problem, layout)) == layout


@given(problems(), st.integers(0, 1000), st.sampled_from([1.0, 1e4, 1e8, 1e12]))
@settings(deadline=None, max_examples=100)
def test_times_and_prices_prove_each_other_however_far_apart_speeds_are(
    problem: Problem, seed: int, ratio: float
) -> None:
    matrix = some_matrix(problem, seed)
    if matrix is None:
        return
    problem = far_apart(problem, ratio)
    layout = layout_of(problem, matrix)
    pools, levels, counts = layout.arrays()
    rates = line_rates(problem.tables, pools, levels)
    solution, times = solve(problem.tables, layout), times_of(problem.tables, layout)
    # Reached with the time there is, and with such prices no more is possible.
    assert (rates * times).sum(axis=0) == pytest.approx(solution.reach, rel=1e-6)
    assert (times.sum(axis=1) <= counts * time_limits(problem.tables, pools, rates) * (1 + 1e-6)).all()
    assert (times <= counts[:, None] * (1 + 1e-6)).all()
    assert bound_by_prices(problem.tables, layout, solution.prices) == pytest.approx(solution.rows_per_s, rel=1e-5)


def test_ranking_by_prices_loses_nothing_against_solving_all_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    solved, offered, seconds, lost = 0, 0, [], []
    for seed in range(6):
        problem = random_problem(seed, 16, 36, (8, 16, 32, 64, 128), capacity_mib=16000)
        matrix = some_matrix(problem, seed)
        assert matrix is not None
        layout = layout_of(problem, matrix)
        point = _Point(layout, solve(problem.tables, layout))
        trace = Trace()
        began = time.process_time()
        found = _best_neighbour(problem.tables, point, 100, trace)
        seconds.append(time.process_time() - began)
        moves = Surroundings(problem.tables, layout, point.solution).moves(100)
        scores = [solve(problem.tables, layout.changed(m.changes)).rows_per_s for m in [together(moves), *moves]]
        reached = found.solution.rows_per_s if found else point.solution.rows_per_s
        lost.append(1 - reached / max([*scores, point.solution.rows_per_s]))
        solved += trace.evaluations
        offered += len(moves)
    with capsys.disabled():
        print(
            f"\nneighbours solved: {solved} of {offered}, lost to solving all: at most {max(lost):.2%}; "
            f"median step {1e3 * float(np.median(seconds)):.0f} ms of one core"
        )
    assert max(lost) <= 1e-6
    assert solved <= 0.2 * offered
    assert np.median(seconds) < 0.15
