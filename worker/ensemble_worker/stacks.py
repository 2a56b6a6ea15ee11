"""Which instances of a device run as one: members of one architecture, stacked where that is quicker.

Made anew when instances come or go, beside the executor; it is timed, so that what is used is known to be quicker.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ensemble_worker.backends.cpu import CpuPredictor, CpuStack
from ensemble_worker.backends.forms import GAIN_TO_SWITCH, TOLERANCES
from ensemble_worker.gather import Array
from ensemble_worker.predictor import Predictor

log = logging.getLogger(__name__)

Run = Callable[[Sequence[Array]], list[list[Array]]]

# Batches at which a stack is compared with its members one after the other, and how often: what is quicker by a tenth
# needs so many comparisons to be seen while other processes start. Large batches have at most so long.
TIMED_ROWS = (1, 8, 64, 512)
TIMED_ROUNDS = 20
TIMED_S = 0.3
# Sets of instances whose parts are remembered; they are what gateways put into one batch, few in practice.
MAX_KNOWN = 4096


class Part(NamedTuple):
    """Instances of a batch, by their positions in it, and what runs them as one; without, the only one runs alone.

    It gives their outputs in pieces, each a list with an array for each output: one piece of them all where the
    positions follow one another, else a piece of each.
    """

    positions: tuple[int, ...]
    run: Run | None


class _Place(NamedTuple):
    """Where an instance is in a stack, which is quicker for up to `rows` rows."""

    stack: CpuStack
    at: int
    rows: int


class Stacks:
    """The stacks among these predictors, by the instances' ids; `instances` has all of these."""

    def __init__(self, predictors: Mapping[int, Predictor]) -> None:
        self.instances = frozenset(predictors)
        self._places: dict[int, _Place] = {}
        self._known: dict[tuple[tuple[int, ...], int], tuple[Part, ...]] = {}
        alike: dict[object, dict[int, CpuPredictor]] = defaultdict(dict)
        for instance, one in sorted(predictors.items()):
            if isinstance(one, CpuPredictor) and one.likeness is not None:
                alike[one.likeness][instance] = one
        for group in (group for group in alike.values() if len(group) > 1):
            members = list(group.values())
            stack = CpuStack(members)
            rows = _quicker_up_to(stack, members)
            log.info("%d members of one architecture run as one in batches of up to %d rows", len(group), rows)
            for at, instance in enumerate(group):
                self._places[instance] = _Place(stack, at, rows)
        # Between two of these numbers of rows, parts are the same.
        self._limits = sorted({place.rows for place in self._places.values()})

    def parts(self, instances: tuple[int, ...], rows: int) -> tuple[Part, ...]:
        """How a batch of so many rows runs through these instances."""
        level = sum(rows > limit for limit in self._limits)
        known = self._known.get((instances, level))
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[instances, level] = self._make(instances, rows)
        return known

    def _make(self, instances: tuple[int, ...], rows: int) -> tuple[Part, ...]:
        parts = []
        stacked: dict[CpuStack, dict[int, int]] = defaultdict(dict)
        for position, instance in enumerate(instances):
            place = self._places.get(instance)
            if place is None or rows > place.rows:
                parts.append(Part((position,), None))
            else:
                stacked[place.stack][place.at] = position
        for stack, positions in stacked.items():
            for first, end in _neighbours(sorted(positions)):
                where = tuple(positions[at] for at in range(first, end))
                together = where == tuple(range(where[0], where[0] + len(where)))
                run = partial(_run_together if together else _run_apart, stack, first, end)
                parts.append(Part(where, run if len(where) > 1 else None))
        return tuple(parts)


def _run_together(stack: CpuStack, first: int, end: int, rows: Sequence[Array]) -> list[list[Array]]:
    return [stack.run(rows, first, end)]


def _run_apart(stack: CpuStack, first: int, end: int, rows: Sequence[Array]) -> list[list[Array]]:
    outputs = stack.run(rows, first, end)
    return [[output[member] for output in outputs] for member in range(end - first)]


def _neighbours(places: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted places as ranges (first, end) without gaps."""
    breaks = [i for i, (one, other) in enumerate(pairwise(places), 1) if other != one + 1]
    return [(places[i], places[j - 1] + 1) for i, j in pairwise([0, *breaks, len(places)])]


def _quicker_up_to(stack: CpuStack, members: Sequence[CpuPredictor]) -> int:
    """The most rows for which a stack agrees with its members and is quicker than they are, here and below; 0: none."""
    most = min(member.batch_size for member in members)
    quicker = 0
    for rows in sorted({min(rows, most) for rows in TIMED_ROWS}):
        batch = members[0].fitted.arrays(rows)
        try:
            if not _agrees(stack, members, batch) or not _is_quicker(stack, members, batch):
                break
        except (RuntimeError, MemoryError) as error:
            log.info("members of one architecture do not run as one: %s", error)
            break
        quicker = rows
    # Larger batches than the largest that is timed are like it.
    return most if quicker == min(most, TIMED_ROWS[-1]) else quicker


def _agrees(stack: CpuStack, members: Sequence[CpuPredictor], batch: Sequence[Array]) -> bool:
    layers = members[0].fitted.layers
    tolerance = TOLERANCES.get(layers.held[0].dtype, 0.0) if layers is not None else 0.0
    outputs = stack.run(batch, 0, len(members))
    for position, member in enumerate(members):
        for output, wanted in zip(outputs, member.run(batch), strict=True):
            scale = max(1.0, float(np.abs(wanted).max()))
            if not np.allclose(output[position], wanted, rtol=0.0, atol=tolerance * scale):
                log.info("members of one architecture do not run as one: their answers differ")
                return False
    return True


def _is_quicker(stack: CpuStack, members: Sequence[CpuPredictor], batch: Sequence[Array]) -> bool:
    """In turns, so that a busy machine is as unfair to both."""
    together = apart = math.inf
    deadline = time.perf_counter() + TIMED_S
    for _ in range(TIMED_ROUNDS):
        started = time.perf_counter()
        stack.run(batch, 0, len(members))
        between = time.perf_counter()
        for member in members:
            member.run(batch)
        ended = time.perf_counter()
        together, apart = min(together, between - started), min(apart, ended - between)
        if ended > deadline:
            break
    return together < GAIN_TO_SWITCH * apart
