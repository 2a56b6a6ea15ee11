"""Where devices wait for one another: an instance steps aside, onto another device's free space, until all have moved.

Two devices that shall swap members, both full, can do nothing alone. Once one of their instances has a copy elsewhere,
it may leave its place. One for each circle of devices that wait is enough; circles are resolved side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from ensemble_operator.rollout.board import Board
from ensemble_operator.rollout.placement import Cell, Version

Sizes = Mapping[Version, Sequence[int]]


def evacuations(board: Board, sizes: Sizes) -> tuple[Cell, ...]:
    """Copies to load on other devices. `sizes` has the batch sizes of every version whose memory may be known."""
    free = dict(board.free)
    loads: list[Cell] = []
    for circle in _circles(board):
        blockers = [
            cell for worker in circle for cell in board.extra.get(worker, ()) if board.live_of[cell.version] == 1
        ]
        for blocker in sorted(blockers, key=lambda cell: (board.memory.taken_bytes(cell), cell)):
            if not _would_help(board, blocker):
                continue
            copy = _refuge(board, free, blocker, sizes)
            if copy is not None:
                free[copy.worker] -= board.memory.need_bytes(copy)
                loads.append(copy)
                break
    return tuple(loads)


def _would_help(board: Board, blocker: Cell) -> bool:
    """Whether something that is missing on the blocker's device fits once it is gone, with what else may go."""
    worker = blocker.worker
    others = sum(
        board.memory.taken_bytes(c) for c in board.extra[worker] if board.live_of[c.version] > 1 and c != blocker
    )
    room = board.free[worker] + board.memory.taken_bytes(blocker) + others
    return any(board.memory.need_bytes(cell) <= room for cell in board.missing[worker])


def _refuge(board: Board, free: Mapping[str, float], blocker: Cell, sizes: Sizes) -> Cell | None:
    """The smallest copy of a blocker, on a device that waits for nothing if possible, and there with the most room."""
    best: tuple[bool, float, Cell] | None = None
    for worker in sorted(free):
        if worker == blocker.worker:
            continue
        copies = [Cell(worker, *blocker.version, size) for size in sizes[blocker.version]]
        need, copy = min((board.memory.need_bytes(copy), copy) for copy in copies)
        if need <= free[worker] and math.isfinite(need):
            found = worker in board.missing, need - free[worker], copy
            best = found if best is None else min(best, found)
    return best[2] if best else None


def _circles(board: Board) -> list[list[str]]:
    """The devices that wait, grouped: two are together when one's extra instance shall go to the other."""
    waits = defaultdict[str, set[str]](set)
    for worker, cells in board.missing.items():
        for cell in cells:
            waits[cell.member].add(worker)
    leader = {worker: worker for worker in board.missing}

    def lead(worker: str) -> str:
        while leader[worker] != worker:
            leader[worker] = leader[leader[worker]]
            worker = leader[worker]
        return worker

    for worker in board.missing:
        for cell in board.extra.get(worker, ()):
            for other in waits[cell.member]:
                leader[lead(other)] = lead(worker)
    circles = defaultdict[str, list[str]](list)
    for worker in sorted(board.missing):
        circles[lead(worker)].append(worker)
    return list(circles.values())
