"""A member that fails is told of once, however often it is tried again, until it has run."""

from __future__ import annotations

from ensemble_operator.control.failing import failing, matrix_key
from ensemble_operator.control.planning import Members, wanted_sources
from ensemble_operator.control.target import Target
from tests.unit.control.ensembles import ensemble, profiled, worker

TWO = ensemble(members=[profiled("a"), profiled("b")])
SOURCES = wanted_sources(TWO)
WANTED = {name: source.digest for name, source in SOURCES.items()}
B = ("b", WANTED["b"])
FAILED = {B: "no model"}


def members(**unplaced: str) -> Members:
    return Members(SOURCES, unplaced, {}, {})


def test_it_fails_while_it_cannot_be_loaded_and_where_an_instance_failed() -> None:
    assert failing([], members(b="no model"), WANTED, {}) == FAILED
    broken = worker("w0", (*B, 1, "failed"), ("a", "old", 1, "failed"))
    assert failing([broken], None, WANTED, {}) == {B: "on w0: it broke", ("a", "old"): "on w0: it broke"}
    assert failing([broken], members(b="no model"), WANTED, {})[B] == "no model"


def test_it_goes_on_failing_while_it_is_tried_again_until_it_runs_or_is_wanted_no_more() -> None:
    trying = worker("w0", (*B, 1, "loading"), ("a", WANTED["a"], 1, "ready"))
    assert failing([trying], members(), WANTED, FAILED) == FAILED
    assert failing([worker("w0", ("b", "former", 1, "ready"))], members(), WANTED, FAILED) == FAILED
    assert failing([worker("w0", (*B, 1, "ready"))], members(), WANTED, FAILED) == {}
    assert failing([trying], members(), {**WANTED, "b": "another"}, FAILED) == {}
    assert failing([trying], members(), {"a": WANTED["a"]}, FAILED) == {}


def test_matrices_of_the_same_instances_are_the_same() -> None:
    one = Target("q", "q", (("a", "d"),), {"w0": ((0, 1),), "w1": ()}, (), {}, 1.0)
    same = Target("r", "s", (("a", "d"),), {"w0": ((0, 1),)}, (), {}, 2.0)
    assert matrix_key(one) == matrix_key(same)
    assert matrix_key(one) != matrix_key(Target("q", "q", (("a", "e"),), one.rows, (), {}))
    assert matrix_key(one) != matrix_key(Target("q", "q", one.digests, {"w0": ((0, 8),)}, (), {}))
