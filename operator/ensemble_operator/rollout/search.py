"""What no simple rule resolves: the shortest order of single moves, looked for, on the few devices that matter (A*).

Exhaustive on a handful of devices and members; beyond, bounded, and then "there is no order" means "none was found".
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, groupby

from ensemble_operator.rollout.board import Move
from ensemble_operator.rollout.evacuation import Sizes
from ensemble_operator.rollout.placement import Cell, Memory, Placement, Service, Version, Wanted

MAX_STATES = 60_000
# Relative to a load, an unload or the switch of all members at once: members one by one, or gone early, are worse.
ONE_BY_ONE, GONE_EARLY = 2, 3


@dataclass(frozen=True, slots=True)
class _State:
    cells: Placement
    service: Service


@dataclass(frozen=True, slots=True)
class Scope:
    """The part of the world that a search may change: these devices; and what lives elsewhere, by version.

    What has `failed` takes memory and stands in for nobody; where it is wanted it stays, not to fail again and again.
    """

    workers: frozenset[str]
    outside: Counter[Version]
    failed: Placement


def route(
    planned: Placement, service: Service, wanted: Wanted, memory: Memory, sizes: Sizes, scope: Scope
) -> list[Move] | None:
    """The moves from what runs, none of it loading, to what is wanted; None if none were found."""
    goal = frozenset(cell for cell in wanted.placement if cell.worker in scope.workers)
    start = _State(frozenset(cell for cell in planned if cell.worker in scope.workers), service)
    copies = _copies(goal, service, wanted, memory, sizes, scope)
    world = _World(wanted, goal, memory, scope, copies)
    serial = count()
    paid, came_by = {start: 0}, dict[_State, tuple[_State, Move]]()
    heap = [(world.distance(start), next(serial), start)]
    closed: set[_State] = set()
    while heap:
        _, _, state = heapq.heappop(heap)
        if state in closed:
            continue
        closed.add(state)
        if state.cells == goal and state.service == wanted.service:
            return _merged(state, came_by)
        for move, cost, following in world.moves(state):
            total = paid[state] + cost
            if following not in closed and total < paid.get(following, total + 1):
                if len(paid) >= MAX_STATES:
                    return None
                paid[following], came_by[following] = total, (state, move)
                heapq.heappush(heap, (total + world.distance(following), next(serial), following))
    return None


@dataclass(frozen=True, slots=True)
class _World:
    """What does not change during a search. `copies` are all cells that may be loaded."""

    wanted: Wanted
    goal: Placement
    memory: Memory
    scope: Scope
    copies: tuple[Cell, ...]

    def distance(self, state: _State) -> int:
        """At least so much is still to be paid: every move mends one difference."""
        return len(state.cells ^ self.goal) + (state.service != self.wanted.service)

    def moves(self, state: _State) -> Iterator[tuple[Move, int, _State]]:
        """Everything that may be done, what it costs, and what comes of it."""
        free = dict(self.memory.usable_bytes)
        lives = Counter(self.scope.outside)
        for cell in state.cells:
            free[cell.worker] -= self.memory.taken_bytes(cell)
            lives[cell.version] += cell not in self.scope.failed
        for cell in self.copies:
            if cell not in state.cells and self.memory.need_bytes(cell) <= free[cell.worker]:
                yield Move(state.service, (cell,)), 1, _State(state.cells | {cell}, state.service)
        for cell in sorted(state.cells):
            if cell in self.scope.failed:
                spare = cell not in self.goal
            else:
                spare = cell.version not in state.service.versions or lives[cell.version] > 1
            if spare:
                yield Move(state.service, (), (cell,)), 1, _State(state.cells - {cell}, state.service)
        for service, cost in self._switches(state.service, lives):
            yield Move(service), cost, _State(state.cells, service)

    def _switches(self, service: Service, lives: Counter[Version]) -> Iterator[tuple[Service, int]]:
        """What gateways may serve next."""
        wanted = self.wanted.service
        if service == wanted:
            return
        placed = {cell.version for cell in self.wanted.placement}
        if all(lives[version] for version in placed.intersection(wanted.versions)):
            yield wanted, 1
        digests = dict(wanted.versions)
        for at, version in enumerate(service.versions):
            before, after = service.versions[:at], service.versions[at + 1 :]
            if version.member not in digests:
                if before or after:
                    yield replace(service, versions=(*before, *after)), GONE_EARLY
                continue
            new = Version(version.member, digests[version.member])
            if new != version and lives[new]:
                yield replace(service, versions=(*before, new, *after)), ONE_BY_ONE


def _copies(
    goal: Placement, service: Service, wanted: Wanted, memory: Memory, sizes: Sizes, scope: Scope
) -> tuple[Cell, ...]:
    """What is wanted, and the smallest copy of every version on every device, where it may step aside."""
    copies = set(goal)
    for version in {*service.versions, *wanted.service.versions}:
        for worker in scope.workers:
            cells = [Cell(worker, *version, size) for size in sizes.get(version, ())]
            if cells:
                copies.add(min(cells, key=lambda cell: (memory.need_bytes(cell), cell)))
    return tuple(sorted(copies))


def _merged(state: _State, came_by: dict[_State, tuple[_State, Move]]) -> list[Move]:
    """The moves that led here, each run of loads and each of unloads as one."""
    moves: list[Move] = []
    while state in came_by:
        state, move = came_by[state]
        moves.append(move)
    moves.reverse()
    merged = []
    for (service, loading, unloading), group in groupby(moves, lambda m: (m.service, bool(m.loads), bool(m.unloads))):
        run = list(group)
        if loading or unloading:
            loads = tuple(cell for move in run for cell in move.loads)
            merged.append(Move(service, loads, tuple(cell for move in run for cell in move.unloads)))
        else:
            merged += run
    return merged
