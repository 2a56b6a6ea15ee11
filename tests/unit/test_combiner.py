"""Every rule against a plain float64 reference, over members, rows, weights, quorum subsets and ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_contract.errors import InvalidPlan
from ensemble_gateway.combiner import _sorting_network, make_rule
from ensemble_gateway.request import Array

RULES = ("mean", "weightedMean", "geometricMean", "median", "max", "min", "vote", "weightedVote")
SYMMETRIC = ("mean", "geometricMean", "median", "max", "min", "vote")
RENORMALISED = ("median", "geometricMean", "max", "min")


def reference(rule: str, stack: Array, weights: Sequence[float], softmax: bool) -> Array:
    """The rule as one would write it down, in float64; `weights` are those of the members in `stack`."""
    values = stack.astype(np.float64)
    if values.ndim == 2:
        return reference(rule, stack[..., None], weights, softmax)[..., 0]
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    by_member = shares.reshape(-1, *[1] * (values.ndim - 1))
    if rule in ("vote", "weightedVote"):
        classes = values.shape[-1]
        ballots = np.eye(classes)[np.argmax(values, axis=-1)]
        return np.asarray(ballots.mean(axis=0) if rule == "vote" else (ballots * by_member).sum(axis=0))
    combined = {
        "mean": values.mean(axis=0),
        "weightedMean": (values * by_member).sum(axis=0),
        "geometricMean": np.prod(values ** (1 / len(values)), axis=0),
        "median": np.median(values, axis=0),
        "max": values.max(axis=0),
        "min": values.min(axis=0),
    }[rule]
    if softmax and rule in RENORMALISED:
        total = combined.sum(axis=-1, keepdims=True)
        combined = np.divide(combined, total, out=np.zeros_like(combined), where=total != 0)
    return np.asarray(combined)


def probabilities(seed: int, members: int, rows: int, shape: tuple[int, ...]) -> Array:
    logits = np.random.default_rng(seed).normal(0, 3, (members, rows, *shape))
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True)) if shape else np.ones_like(logits)
    return (exponentials / (exponentials.sum(axis=-1, keepdims=True) if shape else 1)).astype(np.float32)


@given(
    rule=st.sampled_from(RULES),
    softmax=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20),
    rows=st.integers(1, 7),
    shape=st.sampled_from([(), (1,), (10,), (3, 2, 5)]),
    dtype=st.sampled_from([np.float32, np.float64]),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_reference_for_every_subset(rule, softmax, seed, weights, rows, shape, dtype, draw):  # type: ignore[no-untyped-def]
    used = tuple(sorted(draw.sample(range(len(weights)), draw.randint(1, len(weights)))))
    stack = probabilities(seed, len(used), rows, shape).astype(dtype)
    before = stack.copy()
    got = make_rule(rule, weights, softmax).combine(stack, used)
    assert got.shape == (rows, *shape)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, reference(rule, stack, [weights[i] for i in used], softmax), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(stack, before)
    assert not np.shares_memory(got, stack)


@given(rule=st.sampled_from(SYMMETRIC), softmax=st.booleans(), seed=st.integers(0, 999), members=st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_the_order_of_members_does_not_matter(rule: str, softmax: bool, seed: int, members: int) -> None:
    stack = probabilities(seed, members, 4, (6,))
    shuffled = np.ascontiguousarray(stack[np.random.default_rng(seed).permutation(members)])
    combine = make_rule(rule, [1.0] * members, softmax).combine
    used = tuple(range(members))
    np.testing.assert_allclose(combine(stack, used), combine(shuffled, used), rtol=1e-5, atol=1e-7)


@given(
    rule=st.sampled_from(("mean", "weightedMean", "geometricMean", "median", "max", "min")),
    seed=st.integers(0, 999),
    members=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_a_member_that_is_surer_of_a_class_never_lowers_it(rule: str, seed: int, members: int) -> None:
    random = np.random.default_rng(seed)
    stack = random.uniform(0.01, 1, (members, 3, 4)).astype(np.float32)
    surer = stack.copy()
    surer[random.integers(members)] += np.float32(0.5)
    combine = make_rule(rule, list(random.uniform(0.1, 5, members))).combine
    used = tuple(range(members))
    assert (combine(surer, used) >= combine(stack, used) - 1e-6).all()


@pytest.mark.parametrize("rule", RULES)
def test_probabilities_stay_probabilities_with_64_members(rule: str) -> None:
    stack = probabilities(3, 64, 5, (1000,))
    got = make_rule(rule, list(np.linspace(0.5, 2, 64)), softmax=True).combine(stack, tuple(range(64)))
    np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-4)
    wanted = reference(rule, stack, list(np.linspace(0.5, 2, 64)), softmax=True)
    np.testing.assert_allclose(got, wanted, rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("rule", RENORMALISED)
def test_only_softmax_outputs_are_renormalised(rule: str) -> None:
    stack = np.array([[[0.9, 0.8]], [[0.4, 0.1]], [[0.7, 0.2]]], dtype=np.float32)
    plain = make_rule(rule, [1.0] * 3).combine(stack, (0, 1, 2))
    renormalised = make_rule(rule, [1.0] * 3, softmax=True).combine(stack, (0, 1, 2))
    assert plain.sum() != pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(renormalised, plain / plain.sum(), rtol=1e-5)


def test_weights_are_divided_by_those_of_the_members_that_answered() -> None:
    combine = make_rule("weightedMean", [1.0, 100.0, 3.0]).combine
    np.testing.assert_allclose(combine(np.array([[[8.0]], [[4.0]]], np.float32), (0, 2)), [[5.0]])
    np.testing.assert_allclose(combine(np.array([[[8.0]], [[4.0]]], np.float32), (1, 2)), [[812 / 103]], rtol=1e-6)


def test_extreme_weights_do_not_overflow() -> None:
    stack = np.array([[[1.0]], [[3.0]]], np.float32)
    assert make_rule("weightedMean", [1e308, 1e308]).combine(stack, (0, 1)) == pytest.approx(2)


def test_geometric_mean_of_zeros() -> None:
    stack = np.array([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]], np.float32)
    assert make_rule("geometricMean", [1.0] * 2).combine(stack, (0, 1)).tolist() == [[0, 0.5, 0], [0, 0, 0]]
    # In the second row each class is ruled out by some member: nothing is left to renormalise.
    assert make_rule("geometricMean", [1.0] * 2, softmax=True).combine(stack, (0, 1)).tolist() == [[0, 1, 0], [0, 0, 0]]


def test_geometric_mean_of_probabilities_too_small_to_multiply() -> None:
    stack = np.full((64, 1, 2), 1e-38, np.float32)
    stack[:, :, 1] *= 2
    got = make_rule("geometricMean", [1.0] * 64, softmax=True).combine(stack, tuple(range(64)))
    np.testing.assert_allclose(got, [[1 / 3, 2 / 3]], rtol=1e-4)


def test_ties_go_to_the_lowest_class() -> None:
    stack = np.array([[[0.4, 0.4, 0.2]], [[0.1, 0.45, 0.45]], [[0.3, 0.3, 0.4]]], np.float32)
    shares = make_rule("vote", [1.0] * 3).combine(stack, (0, 1, 2))
    np.testing.assert_allclose(shares, [[1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    shares = make_rule("weightedVote", [2.0, 5.0, 1.0]).combine(stack, (0, 1, 2))
    np.testing.assert_allclose(shares, [[2 / 8, 5 / 8, 1 / 8]], rtol=1e-6)


@pytest.mark.parametrize("rule", ["mean", "weightedMean", "geometricMean", "median", "max", "min"])
@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 8, 16, 17, 24])
def test_nan_of_any_member_is_passed_on_to_its_class(rule: str, members: int) -> None:
    for broken in range(members):
        stack = np.random.default_rng(broken).uniform(0.1, 1, (members, 2, 3)).astype(np.float32)
        stack[broken, 1, 2] = np.nan
        got = make_rule(rule, [1.0] * members).combine(stack, tuple(range(members)))
        assert np.isnan(got).tolist() == [[False] * 3, [False, False, True]]


def test_votes_count_nan_as_lowest() -> None:
    stack = np.array([[[np.nan, 0.1, 0.2]], [[np.nan, -np.inf, -5.0]]], np.float32)
    assert make_rule("vote", [1.0] * 2).combine(stack, (0, 1)).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_infinities_and_overflow_raise_no_warning(rule: str) -> None:
    stack = np.array([[[np.inf, -np.inf, 1e300]], [[-np.inf, np.inf, 1e300]], [[np.inf, np.nan, -1e300]]])
    for softmax in (False, True):
        assert make_rule(rule, [1.0] * 3, softmax).combine(stack, (0, 1, 2)).shape == (1, 3)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.float64])
def test_max_and_min_keep_every_datatype_exactly(dtype: type[np.generic]) -> None:
    stack = np.array([[[2**53 + 1, 0]], [[2**53, 1]]], dtype=np.int64).astype(dtype)
    greatest = make_rule("max", [1.0] * 2).combine(stack, (0, 1))
    assert greatest.dtype == dtype
    assert greatest.tolist() == np.maximum(stack[0], stack[1]).tolist()
    assert make_rule("min", [1.0] * 2).combine(stack, (0, 1)).tolist() == np.minimum(stack[0], stack[1]).tolist()


def test_the_network_sorts_every_sequence_of_zeros_and_ones() -> None:
    """Knuth's zero-one principle: a network that sorts these sorts everything."""
    for lanes in range(1, 11):
        for bits in itertools.product((0, 1), repeat=lanes):
            values = list(bits)
            for low, high in _sorting_network(lanes):
                values[low], values[high] = min(values[low], values[high]), max(values[low], values[high])
            assert values == sorted(bits)


def test_many_subsets_stay_bounded() -> None:
    rule = make_rule("mean", [1.0] * 14)
    for count in range(1, 14):
        for used in itertools.islice(itertools.combinations(range(14), count), 500):
            rule.combine(np.ones((count, 1, 1), np.float32), used)
    assert len(rule._shares) <= 1024


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_divide_is_refused(weight: float) -> None:
    with pytest.raises(InvalidPlan, match=r"members\[1\].weight"):
        make_rule("weightedMean", [1.0, weight])


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(InvalidPlan, match="'none' is not one of mean"):
        make_rule("none", [1.0])
    with pytest.raises(ValueError, match="1 outputs for 2 members"):
        make_rule("mean", [1.0, 1.0]).combine(np.ones((1, 1, 1), np.float32), (0, 1))
