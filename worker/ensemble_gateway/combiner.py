"""Combination rules: the outputs of the members that answered become one output. Pure numpy.

A rule acts on each output apart. Arithmetic is in FP32 and an FP64 output is cast back; `max` and `min` select and so
keep any datatype exactly. The last axis holds the classes; an output of one value a row (shape ()) is one class.

A NaN of a member is passed on to the classes it touches (and, where a rule renormalises, to their row): an average over
a member that computed nonsense is not silently repaired. Votes count a NaN as the lowest value.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from ensemble_contract.errors import InvalidPlan
from ensemble_gateway.request import Array

MAX_CACHED_SUBSETS = 1024
MAX_NETWORK_LANES = 16


class Rule(ABC):
    """One combination rule for the members of one ensemble.

    `weights` has one weight a member, in the plan's order; `softmax` says that every member's output is known to be
    softmax probabilities, which `median`, `geometricMean`, `max` and `min` then renormalise.

    Raises InvalidPlan if a weight is not a finite number above 0.
    """

    def __init__(self, weights: Sequence[float], softmax: bool = False) -> None:
        for position, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise InvalidPlan(f"members[{position}].weight: must be a finite number above 0, got {weight}")
        self._weights = tuple(weights)
        self._softmax = softmax
        self._shares: dict[tuple[int, ...], Array] = {}

    def combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        """Combine `stack` of shape (len(used), rows, *shape) into a new array (rows, *shape) of the same dtype.

        `used` are the indices of the members in `stack`, in its order.

        Raises ValueError if the two disagree or no member answered.
        """
        if not used or stack.shape[0] != len(used):
            raise ValueError(f"combine: {stack.shape[0]} outputs for {len(used)} members")
        if self._is_quiet(stack):
            return self._combine(stack, used)
        with np.errstate(all="ignore"):
            return self._combine(stack, used)

    @abstractmethod
    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array: ...

    def _is_quiet(self, stack: Array) -> bool:  # noqa: ARG002  # of a rule that warns of nothing
        """Whether numpy warns of no value in `stack`, so that it need not be told to be silent, which takes as long."""
        return False

    def _shares_of(self, used: tuple[int, ...]) -> Array:
        """FP32 shares that sum to 1: each member's weight divided by the weights of those that answered."""
        shares = self._shares.get(used)
        if shares is None:
            weights = np.array(self._weights_of(used), dtype=np.float64)
            weights /= weights.max()
            shares = (weights / weights.sum()).astype(np.float32)
            if len(self._shares) >= MAX_CACHED_SUBSETS:
                self._shares.clear()
            self._shares[used] = shares
        return shares

    def _weights_of(self, used: tuple[int, ...]) -> Sequence[float]:
        return [1.0] * len(used)


class _Mean(Rule):
    """Arithmetic mean: one vector-matrix product over all rows of the batch."""

    def _is_quiet(self, stack: Array) -> bool:
        return stack.dtype == np.float32

    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        # ndarray.dot has half the overhead of matmul.
        mean = self._shares_of(used).dot(_fp32(stack).reshape(len(used), -1))
        return _cast(mean, stack.dtype).reshape(stack.shape[1:])


class _WeightedMean(_Mean):
    """Mean with the members' weights."""

    def _weights_of(self, used: tuple[int, ...]) -> Sequence[float]:
        return [self._weights[member] for member in used]


class _GeometricMean(Rule):
    """exp of the mean of logarithms. A zero of any member stays zero; a negative value has no logarithm: NaN."""

    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        logs = np.log(_fp32(stack).reshape(len(used), -1))
        mean = self._shares_of(used).dot(logs).reshape(_rows_and_classes(stack))
        if self._softmax:
            # Relative to the row's greatest, so that small products neither underflow nor lose their ratio.
            top = np.maximum.reduce(mean, axis=-1, keepdims=True)
            mean -= np.where(np.isneginf(top), np.float32(0), top)
        np.exp(mean, out=mean)
        if self._softmax:
            _renormalise(mean)
        return _cast(mean, stack.dtype).reshape(stack.shape[1:])


class _Extreme(Rule):
    """Greatest (or lowest) value of any member, class by class, in the output's own datatype."""

    select: np.ufunc

    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        chosen: Array = self.select.reduce(stack.reshape(len(used), *_rows_and_classes(stack)), axis=0)
        if self._softmax:
            _renormalise(chosen)
        return chosen.reshape(stack.shape[1:])


class _Max(_Extreme):
    select = np.maximum


class _Min(_Extreme):
    select = np.minimum


class _Median(Rule):
    """Middle value, or the mean of the two middle values."""

    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        lanes = _sorted(_fp32(stack).reshape(len(used), -1))
        upper = len(used) // 2
        lower = upper - 1 if len(used) % 2 == 0 else upper
        median = lanes[lower] * np.float32(0.5) + lanes[upper] * np.float32(0.5)
        median = median.reshape(_rows_and_classes(stack))
        if self._softmax:
            _renormalise(median)
        return _cast(median, stack.dtype).reshape(stack.shape[1:])


class _Vote(Rule):
    """Share of the members that put each class first; of equal classes the lowest index is first."""

    def _combine(self, stack: Array, used: tuple[int, ...]) -> Array:
        rows, classes = _rows_and_classes(stack)
        scores = _fp32(stack).reshape(len(used), rows, classes)
        if np.isnan(scores).any():
            scores = np.where(np.isnan(scores), np.float32(-np.inf), scores)
        ballots = scores.argmax(axis=-1)
        ballots += np.arange(rows) * classes
        weights = np.repeat(self._shares_of(used), rows)
        shares = np.bincount(ballots.ravel(), weights, minlength=rows * classes)
        return shares.astype(stack.dtype).reshape(stack.shape[1:])


class _WeightedVote(_Vote):
    """Share of the weights of the members that put each class first."""

    def _weights_of(self, used: tuple[int, ...]) -> Sequence[float]:
        return [self._weights[member] for member in used]


_RULES: dict[str, type[Rule]] = {
    "mean": _Mean,
    "weightedMean": _WeightedMean,
    "geometricMean": _GeometricMean,
    "median": _Median,
    "max": _Max,
    "min": _Min,
    "vote": _Vote,
    "weightedVote": _WeightedVote,
}


def make_rule(name: str, weights: Sequence[float], softmax: bool = False) -> Rule:
    """The rule called `name` in a plan, for members with these weights. `none` combines nothing and has no rule.

    Raises InvalidPlan if there is no such rule or a weight is not above 0.
    """
    if name not in _RULES:
        raise InvalidPlan(f"rule: {name!r} is not one of {', '.join(_RULES)}")
    return _RULES[name](weights, softmax)


def _fp32(stack: Array) -> Array:
    """`stack` in FP32; FP64 values beyond its range become infinite."""
    return stack if stack.dtype == np.float32 else stack.astype(np.float32)


def _cast(values: Array, dtype: np.dtype[np.generic]) -> Array:
    return values if values.dtype == dtype else values.astype(dtype)


def _rows_and_classes(stack: Array) -> tuple[int, int]:
    """How many class vectors the output has, and how long each is."""
    classes = stack.shape[-1] if stack.ndim > 2 else 1
    return math.prod(stack.shape[1:]) // classes, classes


def _renormalise(values: Array) -> None:
    """Divide each row of (rows, classes) by its sum, in place. A row of zeros, with no class left, stays as it is."""
    sums = np.add.reduce(values, axis=-1, keepdims=True)
    sums[sums == 0] = 1
    np.divide(values, sums, out=values)


def _sorted(lanes: Array) -> Array:
    """A copy of `lanes` of shape (members, n), sorted along the members; a NaN makes its whole column NaN.

    Few members are sorted by a network of minimum and maximum over all columns at once, which is 10 times faster for a
    batch of 64 rows of 1,000 classes than numpy's sort of one column after the other; with many members it is slower.
    """
    members = len(lanes)
    if members > MAX_NETWORK_LANES:
        ordered: Array = np.sort(lanes, axis=0)
        ordered[:, np.isnan(ordered[-1])] = np.nan
        return ordered
    ordered = lanes.copy()
    lower = np.empty_like(ordered[0])
    for low, high in _sorting_network(members):
        np.minimum(ordered[low], ordered[high], out=lower)
        np.maximum(ordered[low], ordered[high], out=ordered[high])
        ordered[low] = lower
    return ordered


@functools.lru_cache(maxsize=MAX_NETWORK_LANES)
def _sorting_network(lanes: int) -> tuple[tuple[int, int], ...]:
    """Pairs to put in order, one after the other, that sort any `lanes` values.

    Batcher's odd-even merge sort (K. E. Batcher, Sorting networks and their applications, 1968; the iterative form of
    Knuth, The Art of Computer Programming, volume 3, 5.2.2, algorithm M).
    """
    pairs: list[tuple[int, int]] = []
    span = 1
    while span < lanes:
        step = span
        while step >= 1:
            for first in range(step % span, lanes - step, 2 * step):
                lows = range(first, min(first + step, lanes - step))
                pairs.extend((low, low + step) for low in lows if low // (2 * span) == (low + step) // (2 * span))
            step //= 2
        span *= 2
    return tuple(pairs)
