"""The steps of a rollout: the next one from what is observed, or the whole sequence in advance.

A step is only taken if the sequence that begins with it leads to what is wanted, as far as loads succeed: nothing is
begun that cannot be ended.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from ensemble_operator.rollout.board import Board, Move
from ensemble_operator.rollout.evacuation import Sizes, evacuations
from ensemble_operator.rollout.placement import (
    Blocked,
    Cell,
    Done,
    Failed,
    Memory,
    Outcome,
    Placement,
    Running,
    Service,
    Step,
    Version,
    Waiting,
    Wanted,
)
from ensemble_operator.rollout.search import Scope, route

MAX_MOVES = 1000
# A search looks at all devices where they are so few, else at those that wait and a few with room.
FEW_WORKERS, ROOMY_WORKERS = 8, 3


@dataclass(frozen=True, slots=True)
class Sequence:
    """Moves from what is observed; `blocked` where they do not lead to what is wanted."""

    moves: tuple[Move, ...]
    blocked: Blocked | None = None


def next_step(running: Running, wanted: Wanted, memory: Memory) -> Outcome:
    """What to plan next, from what is observed.

    Step: plan this. Waiting: look again when something has changed. Done, Blocked (nothing has been begun that cannot
    go on) or Failed (a version cannot be loaded anywhere: go back, or on without it).
    """
    board = Board(running, wanted, memory)
    if (fault := _too_large(wanted, memory) or _dead(board)) is not None:
        return fault
    if board.done:
        return Done()
    under_way = Waiting(tuple(sorted(board.loading)), tuple(sorted(board.lingering)))
    if not board.quiet and board.next_move() is None:
        return under_way
    found = _sequence(running, wanted, memory)
    if found.blocked is None:
        return _step(running.planned, found.moves[0], memory)
    return found.blocked if board.quiet else under_way


def steps(running: Running, wanted: Wanted, memory: Memory) -> tuple[tuple[Step, ...], Blocked | None]:
    """The whole sequence if every load succeeds, and why it does not lead to what is wanted, if so.

    Ask before anything is changed.
    """
    if (fault := _too_large(wanted, memory)) is not None:
        return (), fault
    found = _sequence(running, wanted, memory)
    if found.blocked is not None:
        return (), found.blocked
    taken, planned = [], running.planned
    for move in found.moves:
        taken.append(_step(planned, move, memory))
        planned = taken[-1].placement
    return tuple(taken), None


def _sequence(running: Running, wanted: Wanted, memory: Memory) -> Sequence:
    """By the rules, else by search, else, if that is allowed, with requests held meanwhile."""
    board = Board(running, wanted, memory)
    quiet = board.quiet
    sizes = _sizes(running, wanted, memory)
    moves = _by_rules(board, sizes)
    if board.done:
        return Sequence(tuple(moves))
    blocked = _shortage(board)
    if not quiet:
        return Sequence((), blocked)
    if (found := _by_search(running, wanted, memory, sizes, board)) is not None:
        return Sequence(tuple(found))
    if wanted.pause and running.service is not None and not running.service.hold:
        held = Move(replace(wanted.service, hold=True))
        board = Board(replace(running, service=held.service), wanted, memory)
        moves = _by_rules(board, sizes)
        if board.done:
            return Sequence((held, *moves))
    return Sequence((), blocked)


def _by_rules(board: Board, sizes: Sizes) -> list[Move]:
    """Move after move, each as if it were finished when the next begins, until nothing more can be done."""
    moves: list[Move] = []
    seen = set[tuple[frozenset[Cell], Service, tuple[Cell, ...]]]()
    while len(moves) < MAX_MOVES:
        move = board.next_move()
        if move is None and board.quiet and board.missing:
            copies = evacuations(board, sizes)
            state = frozenset(cell for cells in board.missing.values() for cell in cells), board.service, copies
            if copies and state not in seen:
                seen.add(state)
                move = Move(board.service, copies)
        if move is None and board.quiet:
            break
        if move is not None:
            moves.append(move)
            board.make(move)
        board.finish()
    return moves


def _by_search(running: Running, wanted: Wanted, memory: Memory, sizes: Sizes, stuck: Board) -> list[Move] | None:
    """The search's moves, and those that the rules add elsewhere."""
    if running.service is None:
        return None
    planned = frozenset(cell for cell in running.planned if cell.worker in memory.usable_bytes)
    scope = _scope(planned, running.failed, memory, stuck)
    moves = route(planned, running.service, wanted, memory, sizes, scope)
    if moves is None:
        return None
    board = Board(running, wanted, memory)
    for move in moves:
        board.make(move)
        board.finish()
    moves += _by_rules(board, sizes)
    return moves if board.done else None


def _scope(planned: Placement, failed: Placement, memory: Memory, stuck: Board) -> Scope:
    """All devices, or those that wait, those of the instances that they wait for, and a few with room."""
    workers = set(memory.usable_bytes)
    if len(workers) > FEW_WORKERS:
        roomy = sorted(workers, key=lambda worker: (-stuck.free[worker], worker))
        workers = set(sorted(stuck.missing)[: FEW_WORKERS - ROOMY_WORKERS]) | set(roomy[:ROOMY_WORKERS])
    outside = Counter(cell.version for cell in planned - failed if cell.worker not in workers)
    return Scope(frozenset(workers), outside, failed)


def _sizes(running: Running, wanted: Wanted, memory: Memory) -> Sizes:
    """The batch sizes that each version may be placed with for a while."""
    sizes = defaultdict[Version, set[int]](lambda: set(memory.batch_sizes))
    for cell in (*running.planned, *wanted.placement):
        sizes[cell.version].add(cell.batch_size)
    return {version: sorted(found) for version, found in sizes.items()}


def _step(planned: Placement, move: Move, memory: Memory) -> Step:
    kept = (cell for cell in planned.difference(move.unloads) if cell.worker in memory.usable_bytes)
    return Step(frozenset(kept).union(move.loads), move.service, move.loads, move.unloads)


def _too_large(wanted: Wanted, memory: Memory) -> Blocked | None:
    """Why what is wanted does not fit, whatever the way there."""
    free = dict(memory.usable_bytes)
    for cell in sorted(wanted.placement):
        need = memory.need_bytes(cell)
        if cell.worker not in free:
            return Blocked(cell.worker, cell.member, cell.batch_size, need)
        free[cell.worker] -= need
        if free[cell.worker] < 0:
            return Blocked(cell.worker, cell.member, cell.batch_size, -free[cell.worker])
    return None


def _dead(board: Board) -> Failed | None:
    """A version that shall be served, all of whose wanted instances have failed."""
    if not board.failed:
        return None
    for version in sorted(board.required()):
        cells = tuple(sorted(cell for cell in board.wanted.placement if cell.version == version))
        if board.failed.issuperset(cells):
            return Failed(version, cells)
    return None


def _shortage(board: Board) -> Blocked:
    """Where the least is missing."""
    missing = (cell for cells in board.missing.values() for cell in cells)
    lacking, cell = min((board.memory.need_bytes(cell) - board.free[cell.worker], cell) for cell in missing)
    return Blocked(cell.worker, cell.member, cell.batch_size, lacking)
