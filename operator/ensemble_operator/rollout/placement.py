"""The words of a rollout: instances, what gateways serve, what is observed, what is wanted, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Version(NamedTuple):
    """A member as one of its digests."""

    member: str
    digest: str


class Cell(NamedTuple):
    """An instance: a version of a member on a worker's device, with its batch size in rows."""

    worker: str
    member: str
    digest: str
    batch_size: int

    @property
    def version(self) -> Version:
        """What answers there."""
        return Version(self.member, self.digest)


Placement = frozenset[Cell]


@dataclass(frozen=True, slots=True)
class Service:
    """What gateways serve: the version of every member, in order.

    `terms` is all else that clients notice (weights, rule, quorum, limits), only ever compared. With `hold` requests
    wait for members without a live instance.
    """

    versions: tuple[Version, ...]
    terms: Hashable = ""
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that instances may take on every worker's device, and what one takes: infinite where it cannot run.

    A worker that is not listed is gone, and what is placed there counts for nothing. `batch_sizes` are those that an
    instance may have for a while, to step aside, besides those that are placed.
    """

    usable_bytes: Mapping[str, float]
    need_bytes: Callable[[Cell], float]
    batch_sizes: tuple[int, ...] = ()

    def taken_bytes(self, cell: Cell) -> float:
        """Bytes that an instance takes where it runs: all of its device where that is not known."""
        return min(self.need_bytes(cell), self.usable_bytes[cell.worker])


@dataclass(frozen=True, slots=True)
class Running:
    """What is observed.

    `planned` is what the newest plan holds, `live` what workers report ready of it, `failed` what they cannot load;
    the rest is on its way. `lingering` is what workers still hold although the newest plan does not. `service` is what
    gateways were told last (None: nothing yet), `settled` whether all of them serve exactly that, without a request
    left under anything former.
    """

    planned: Placement
    live: Placement
    service: Service | None
    settled: bool = True
    failed: Placement = frozenset()
    lingering: Placement = frozenset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where to go. With `pause`, requests may be held during the change where nothing else is possible."""

    placement: Placement
    service: Service
    pause: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """What to plan next: the whole placement, what gateways shall serve, and what of it is new or goes."""

    placement: Placement
    service: Service
    loads: tuple[Cell, ...] = ()
    unloads: tuple[Cell, ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something is under way and nothing can be done until it is: these loads and unloads, or gateways' requests."""

    loads: tuple[Cell, ...]
    unloads: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What is wanted is what runs."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """No order of loads and unloads leads to what is wanted: on this device so many bytes are missing for a member."""

    worker: str
    member: str
    batch_size: int
    missing_bytes: float


@dataclass(frozen=True, slots=True)
class Failed:
    """A version that shall be served could be loaded on none of the devices that it is wanted on, its `cells`."""

    version: Version
    cells: tuple[Cell, ...]


Outcome = Step | Waiting | Done | Blocked | Failed
