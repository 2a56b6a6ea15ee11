"""Small worlds for rollouts: devices with some units of memory, members that need some, and what may happen there."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from ensemble_operator.rollout.placement import Cell, Memory, Placement, Running, Service, Step, Version, Wanted

Needs = Mapping[tuple[Version, int], int]


@dataclass(frozen=True, slots=True)
class World:
    """From where to where, with what memory."""

    running: Running
    wanted: Wanted
    memory: Memory
    needs: Needs


def version(text: str) -> Version:
    """`a1` is digest 1 of member a."""
    return Version(text[0], text[1:])


def placement(rows: Mapping[str, str]) -> Placement:
    """`{"w0": "a1x8 b1x1"}`."""
    cells = []
    for worker, row in rows.items():
        for text in row.split():
            name, _, size = text.partition("x")
            cells.append(Cell(worker, *version(name), int(size or 1)))
    return frozenset(cells)


def service(text: str, terms: str = "", *, hold: bool = False) -> Service:
    """`a1 b1`."""
    return Service(tuple(version(name) for name in text.split()), terms, hold)


def memory(usable: Mapping[str, float], needs: Mapping[str, float]) -> Memory:
    """`{"a1x8": 3}`; without a size: for all sizes."""

    def need(cell: Cell) -> float:
        name = f"{cell.member}{cell.digest}"
        return needs.get(f"{name}x{cell.batch_size}", needs.get(name, float("inf")))

    return Memory(usable, need)


def live(rows: Mapping[str, str], served: Service | None) -> Running:
    """All of it live and settled."""
    cells = placement(rows)
    return Running(cells, cells, served)


def finished(running: Running, step: Step) -> Running:
    """What is observed when all of a step has come to its end."""
    return Running(step.placement, step.placement, step.service)


def check(world: World, running: Running) -> None:
    """What must hold at any time: memory, and a live instance of every version that requests may need."""
    for worker, usable in world.memory.usable_bytes.items():
        held = [cell for cell in running.planned | running.lingering if cell.worker == worker]
        assert sum(map(world.memory.need_bytes, held)) <= usable, f"{worker} holds too much: {sorted(held)}"
    if running.service is not None and not running.service.hold:
        alive = {cell.version for cell in running.live}
        assert alive.issuperset(running.service.versions), f"{set(running.service.versions) - alive} lost"


@st.composite
def worlds(draw: st.DrawFn, *, most_devices: int = 3, most_members: int = 3, slack: int = 2) -> World:
    """Two plans that fit the same devices, tightly: `slack` is the most memory that both leave free on a device."""
    devices = [f"w{i}" for i in range(draw(st.integers(1, most_devices)))]
    names = [chr(97 + i) for i in range(draw(st.integers(1, most_members)))]
    needs: dict[tuple[Version, int], int] = {}
    for name in names:
        for digest in ("1", "2"):
            small = draw(st.integers(1, 3))
            needs[Version(name, digest), 1] = small
            needs[Version(name, digest), 8] = small + draw(st.integers(0, 2))

    def plan(members: list[Version]) -> Placement:
        cells = set[Cell]()
        for member in members:
            for device in draw(st.sets(st.sampled_from(devices), min_size=1)):
                cells.add(Cell(device, *member, draw(st.sampled_from((1, 8)))))
        return frozenset(cells)

    old = [Version(name, "1") for name in sorted(draw(st.sets(st.sampled_from(names), min_size=1)))]
    new = [
        Version(name, draw(st.sampled_from("112")))
        for name in sorted(draw(st.sets(st.sampled_from(names), min_size=1)))
    ]
    before, after = plan(old), plan(new)

    def used(cells: Placement, device: str) -> int:
        return sum(needs[cell.version, cell.batch_size] for cell in cells if cell.worker == device)

    usable = {d: max(used(before, d), used(after, d)) + draw(st.integers(0, slack)) for d in devices}
    served, goal = Service(tuple(old), "before"), Service(tuple(new), draw(st.sampled_from(("before", "after"))))
    return World(
        Running(before, before, served),
        Wanted(after, goal),
        Memory(usable, lambda cell: float(needs.get((cell.version, cell.batch_size), 10**6)), (1, 8)),
        needs,
    )


class Reality:
    """A world in which loads, unloads and switches end one by one, in any order, and plans reach workers late."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.running = world, world.running
        self._random = random.Random(seed)

    def plan(self, step: Step) -> None:
        """A new plan is published."""
        before = self.running
        gone = before.planned - step.placement
        self.running = Running(
            step.placement,
            before.live & step.placement,
            step.service,
            before.settled and step.service == before.service,
            before.failed & step.placement,
            (before.lingering | gone) - step.placement,
        )
        check(self.world, self.running)

    def pass_time(self) -> bool:
        """Something that is under way comes to its end; False if nothing is."""
        now = self.running
        loading, lingering = sorted(now.planned - now.live), sorted(now.lingering)
        ends = [*loading, *lingering, *([] if now.settled else [None])]
        if not ends:
            return False
        end = self._random.choice(ends)
        if end is None:
            self.running = replace(now, settled=True)
        elif end in now.lingering:
            self.running = replace(now, lingering=now.lingering - {end})
        else:
            self.running = replace(now, live=now.live | {end})
        check(self.world, self.running)
        return True


def reachable(world: World) -> bool:
    """Whether any order of single loads, unloads and switches leads to what is wanted: all of them are tried."""
    needs = world.needs
    devices = world.memory.usable_bytes
    cells = [Cell(device, *version, size) for device in devices for version, size in needs]
    start = (world.running.planned, world.running.service)
    seen, todo = {start}, deque([start])
    while todo:
        state = todo.popleft()
        if state == (world.wanted.placement, world.wanted.service):
            return True
        for following in _everything(world, cells, *state):
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return False


def _everything(
    world: World, cells: list[Cell], planned: Placement, served: Service | None
) -> Iterator[tuple[Placement, Service | None]]:
    assert served is not None
    alive = {cell.version for cell in planned}
    wanted = world.wanted.service
    for cell in cells:
        if cell in planned:
            left = planned - {cell}
            if {c.version for c in left}.issuperset(served.versions):
                yield left, served
        else:
            held = [c for c in planned if c.worker == cell.worker]
            if sum(map(world.memory.need_bytes, (*held, cell))) <= world.memory.usable_bytes[cell.worker]:
                yield planned | {cell}, served
    if served != wanted and alive.issuperset(wanted.versions):
        yield planned, wanted
    digests = dict(wanted.versions)
    for at, one in enumerate(served.versions):
        others = served.versions[:at], served.versions[at + 1 :]
        if one.member not in digests:
            if any(others):
                yield planned, replace(served, versions=(*others[0], *others[1]))
        elif (new := Version(one.member, digests[one.member])) != one and new in alive:
            yield planned, replace(served, versions=(*others[0], new, *others[1]))
