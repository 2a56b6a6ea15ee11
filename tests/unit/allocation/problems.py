"""Random problems, and a checker that knows nothing of the code that it checks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from ensemble_operator.allocation.matrix import Matrix
from ensemble_operator.allocation.problem import DeviceSpec, Member, Problem, Profile

MIB = 1 << 20


def random_problem(
    seed: int,
    devices: int,
    members: int,
    sizes: tuple[int, ...] = (8, 32, 128),
    capacity_mib: int = 8000,
    classes: int = 1,
    colocation: float = 1.0,
) -> Problem:
    """Saturating rows/s and linear memory over the batch size, as real networks have; classes differ in speed."""
    draw = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(members)]
    kinds = [f"class{i}" for i in range(classes)]
    profiles = []
    for name in names:
        fastest, half, weights, activations = (
            draw.uniform(100, 1000),
            draw.uniform(2, 30),
            draw.uniform(50, 1200),
            draw.uniform(1, 30),
        )
        for kind in kinds:
            speed = draw.uniform(0.2, 1.0)
            for size in sizes:
                rate = speed * fastest * size / (size + half)
                memory = int((weights + activations * size) * MIB)
                profiles.append(Profile(name, kind, size, rate, size / rate, memory))
    specs = tuple(
        DeviceSpec(
            f"d{i}",
            kinds[i % classes],
            "cpu" if i % classes == classes - 1 > 0 else "cuda",
            capacity_mib * MIB,
            300 * MIB,
        )
        for i in range(devices)
    )
    known = {s.device_class for s in specs}
    return Problem(
        tuple(Member(n) for n in names),
        specs,
        tuple(p for p in profiles if p.device_class in known),
        sizes,
        colocation=dict.fromkeys(known, colocation),
    )


def problems(max_devices: int = 6, max_members: int = 6) -> st.SearchStrategy[Problem]:
    return st.builds(
        random_problem,
        seed=st.integers(0, 2**32 - 1),
        devices=st.integers(1, max_devices),
        members=st.integers(1, max_members),
        sizes=st.sampled_from([(1,), (8, 64), (1, 8, 32, 128)]),
        capacity_mib=st.sampled_from([1500, 3000, 6000, 16000]),
        classes=st.integers(1, 2),
        colocation=st.sampled_from([0.7, 1.0, 1.3]),
    )


def far_apart(problem: Problem, ratio: float) -> Problem:
    """The problem with members whose speeds differ by as much more, in equal steps from the first to the last."""
    last = max(1, len(problem.members) - 1)
    faster = {member.name: ratio ** (at / last) for at, member in enumerate(problem.members)}
    profiles = tuple(
        replace(p, rows_per_s=p.rows_per_s * faster[p.member], latency_s=p.latency_s / faster[p.member])
        for p in problem.profiles
    )
    return replace(problem, profiles=profiles)


def misfits(problem: Problem, matrix: Matrix) -> list[str]:
    """What is infeasible about a matrix, recomputed from the problem's own words in whole bytes."""
    cost = {(p.member, p.device_class, p.batch_size): p.memory_bytes for p in problem.profiles}
    found = []
    placed = set()
    for row, device in enumerate(problem.devices):
        total = 0
        for column, member in enumerate(problem.members):
            size = int(matrix.sizes[row, column])
            if size == 0:
                continue
            placed.add(member.name)
            if (member.name, device.device_class, size) not in cost:
                found.append(f"{member.name} has no profile on {device.name} at {size}")
                continue
            total += cost[member.name, device.device_class, size]
        if total and total + device.overhead_bytes > device.capacity_bytes * (1 - problem.headroom):
            found.append(f"{device.name} is over its memory")
    found += [f"{m.name} is not placed" for m in problem.members if m.name not in placed]
    return found


def every_matrix(problem: Problem) -> Iterator[Matrix]:
    """All matrices over interchangeable devices, feasible or not, each set of rows in one of its orders."""
    rows = itertools.product((0, *problem.batch_sizes), repeat=len(problem.members))
    for sizes in itertools.combinations_with_replacement(list(rows), len(problem.devices)):
        yield Matrix.of(problem, sizes)
