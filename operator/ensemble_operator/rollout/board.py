"""One move after the other towards what is wanted, each as large as it can be: devices change side by side.

Loads go first, into free space. What nobody needs any more goes next. Where a load does not fit, instances that others
stand in for make room, at most half of a version's at a time as long as that leads on. Gateways switch to the new
versions when nothing more can be loaded before; members one by one only where memory forces it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ensemble_operator.rollout.placement import Cell, Memory, Running, Service, Version, Wanted


@dataclass(frozen=True, slots=True)
class Move:
    """Loads and unloads that can be made at once; and what gateways serve from then on."""

    service: Service
    loads: tuple[Cell, ...] = ()
    unloads: tuple[Cell, ...] = ()


class Board:
    """What runs, as counts. `missing` and `extra` are the differences to what is wanted, by worker."""

    def __init__(self, running: Running, wanted: Wanted, memory: Memory) -> None:
        self.wanted, self.memory = wanted, memory
        there = memory.usable_bytes
        planned = {cell for cell in running.planned if cell.worker in there}
        self.lingering = [cell for cell in running.lingering - running.planned if cell.worker in there]
        self.free: dict[str, float] = dict(there)
        for cell in (*planned, *self.lingering):
            self.free[cell.worker] -= self.memory.taken_bytes(cell)
        self.live = set(running.live & planned)
        self.failed = running.failed & planned
        self.loading = planned - self.live - self.failed
        self.live_of = Counter(cell.version for cell in self.live)
        self.missing = _by_worker(wanted.placement - planned)
        self.extra = _by_worker(planned - wanted.placement)
        settled = self.live | self.failed
        self.open_of = Counter(cell.member for cell in wanted.placement if cell not in settled)
        self.goal_of = Counter(cell.member for cell in wanted.placement)
        self.settled = running.settled
        self.told = running.service is not None
        self.service = wanted.service if running.service is None else running.service

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way."""
        return not self.loading and not self.lingering and self.settled

    @property
    def done(self) -> bool:
        """Whether what is wanted is what runs."""
        same = self.told and self.service == self.wanted.service
        return same and self.quiet and not self.missing and not self.extra

    @property
    def holding(self) -> bool:
        """Whether requests wait, so that a version may be without an instance."""
        return self.service.hold and self.wanted.pause and self.settled

    def served(self, version: Version) -> bool:
        """Whether requests may need this version: any that runs, while gateways change."""
        return not self.holding and (not self.settled or version in self.service.versions)

    def next_move(self) -> Move | None:
        """What can be done now; None if nothing can, or something under way has to come first."""
        if self.service.hold and self.wanted.pause and not _alike(self.service, self.wanted.service):
            return Move(replace(self.wanted.service, hold=True))
        loads = self._loads()
        unloads = self._idle()
        unloads += self._room(loads, unloads, gently=True)
        if loads or unloads or not self.told:
            return Move(self.service, tuple(loads), tuple(unloads))
        if not self.quiet:
            return None
        if self.service != self.wanted.service and all(map(self.live_of.__getitem__, self.required())):
            return Move(self.wanted.service)
        if unloads := self._room((), (), gently=False):
            return Move(self.service, (), tuple(unloads))
        partly = self._partly_switched()
        return None if partly == self.service else Move(partly)

    def make(self, move: Move) -> None:
        """Begin a move: memory of what goes is free when it is `finish`ed."""
        self.settled = self.settled and self.told and move.service == self.service
        self.service, self.told = move.service, True
        for cell in move.loads:
            self.free[cell.worker] -= self.memory.taken_bytes(cell)
            self.loading.add(cell)
            if cell in self.wanted.placement:
                _drop(self.missing, cell)
            else:
                self.extra.setdefault(cell.worker, set()).add(cell)
        for cell in move.unloads:
            self.lingering.append(cell)
            self.loading.discard(cell)
            if cell in self.live:
                self.live.discard(cell)
                self.live_of[cell.version] -= 1
            if cell in self.wanted.placement:
                self.missing.setdefault(cell.worker, set()).add(cell)
                self.open_of[cell.member] += 1
            else:
                _drop(self.extra, cell)

    def finish(self) -> None:
        """Everything under way has come to its end."""
        for cell in self.lingering:
            self.free[cell.worker] += self.memory.taken_bytes(cell)
        self.live |= self.loading
        for cell in self.loading:
            self.live_of[cell.version] += 1
            if cell in self.wanted.placement:
                self.open_of[cell.member] -= 1
        self.lingering, self.loading, self.settled = [], set(), True

    def required(self) -> set[Version]:
        """The versions that must live before gateways switch: those to be served that are to be placed at all."""
        placed = {cell.version for cell in self.wanted.placement}
        return placed.intersection(self.wanted.service.versions)

    def urgency(self, cell: Cell) -> tuple[bool, float, Cell]:
        """Orders the loads of a device: versions without any instance first, then the small ones."""
        return self.live_of[cell.version] > 0, self.memory.need_bytes(cell), cell

    def _loads(self) -> list[Cell]:
        """Everything wanted that fits beside all that is there."""
        loads = []
        for worker, cells in sorted(self.missing.items()):
            free = self.free[worker]
            for cell in sorted(cells, key=self.urgency):
                need = self.memory.need_bytes(cell)
                if need <= free:
                    loads.append(cell)
                    free -= need
        return loads

    def _idle(self) -> list[Cell]:
        """What nobody needs any more, and one version's last instance never."""
        wanted = set(self.wanted.service.versions)
        unloads: list[Cell] = []
        spent: Counter[Version] = Counter()
        for cell in sorted(cell for cells in self.extra.values() for cell in cells):
            version = cell.version
            served = self.served(version)
            if cell in self.failed or not (served or version in wanted):
                unloads.append(cell)
                continue
            # The old version of a replaced member goes after the switch, and what moves when it has arrived.
            if self.open_of[cell.member] or (served and version not in wanted):
                continue
            if cell not in self.live or not served or self.live_of[version] - spent[version] > 1:
                unloads.append(cell)
                spent[version] += cell in self.live
        return unloads

    def _room(self, loads: Collection[Cell], going: Collection[Cell], *, gently: bool) -> list[Cell]:
        """Extra instances that make way for a load that does not fit, on every device that has such a load.

        `loads` and `going` are what this move loads and unloads besides.
        """
        free, spare = dict(self.free), dict[Version, float]()
        for cell in loads:
            free[cell.worker] -= self.memory.taken_bytes(cell)
        for cell in (*self.lingering, *going):
            free[cell.worker] += self.memory.taken_bytes(cell)
        for cell in self.live.intersection(going):
            spare[cell.version] = self._spare(spare, cell.version, gently) - 1
        unloads: list[Cell] = []
        for worker, cells in sorted(self.missing.items()):
            extras = self.extra.get(worker, set()).difference(going)
            order = sorted(extras, key=lambda cell: (self.served(cell.version), -self.memory.taken_bytes(cell), cell))
            room = free[worker]
            for cell in sorted(cells.difference(loads), key=self.urgency):
                room -= self.memory.need_bytes(cell)
                chosen = self._chosen(order, -room, spare, gently=gently)
                if room < 0 and not chosen:
                    break
                room += sum(map(self.memory.taken_bytes, chosen))
                order = [one for one in order if one not in chosen]
                unloads += chosen
        return unloads

    def _chosen(
        self, extras: Iterable[Cell], lacking: float, spare: dict[Version, float], *, gently: bool
    ) -> list[Cell]:
        """The first of a device's extra instances that free what is lacking; none if all of them do not."""
        chosen: list[Cell] = []
        left = dict[Version, float]()
        for cell in extras:
            if lacking <= 0:
                break
            version = cell.version
            has = left.get(version, self._spare(spare, version, gently))
            if cell in self.live and has < 1:
                continue
            chosen.append(cell)
            lacking -= self.memory.taken_bytes(cell)
            left[version] = has - (cell in self.live)
        if lacking > 0:
            return []
        spare.update(left)
        return chosen

    def _spare(self, spare: dict[Version, float], version: Version, gently: bool) -> float:
        """How many live instances of a version may go now."""
        if version in spare:
            return spare[version]
        live = self.live_of[version]
        if not self.served(version):
            return math.inf
        if gently:
            return live - max(1, math.ceil(self.goal_of[version.member] / 2))
        return min(1, live - 1)

    def _partly_switched(self) -> Service:
        """What gateways serve, with the members changed whose old instances are in the way; the same if none can be.

        Replaced members first; what is to be removed goes early only where that is not enough.
        """
        wanted = dict(self.wanted.service.versions)
        blocking = {cell.version for worker in self.missing for cell in self.extra.get(worker, ())}
        versions = []
        for version in self.service.versions:
            new = Version(version.member, wanted.get(version.member, version.digest))
            versions.append(new if version in blocking and self.live_of[new] else version)
        if tuple(versions) == self.service.versions:
            kept = [version for version in versions if version.member in wanted or version not in blocking]
            versions = kept or versions
        return replace(self.service, versions=tuple(versions))


def _alike(one: Service, other: Service) -> bool:
    return replace(one, hold=False) == replace(other, hold=False)


def _by_worker(cells: Iterable[Cell]) -> dict[str, set[Cell]]:
    found: dict[str, set[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.worker, set()).add(cell)
    return found


def _drop(cells: dict[str, set[Cell]], cell: Cell) -> None:
    left = cells[cell.worker]
    left.discard(cell)
    if not left:
        del cells[cell.worker]
