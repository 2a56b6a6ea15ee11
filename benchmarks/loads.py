"""The loads that are measured, and the speed to reach for each: shares of the raw bound of plain members."""

from __future__ import annotations

import msgspec


class Load(msgspec.Struct, frozen=True):
    """A closed loop: `connections` clients, each with one request of `rows` rows in flight."""

    name: str
    connections: int
    rows: int

    @property
    def rows_in_flight(self) -> int:
        """Rows that the server has at any moment."""
        return self.connections * self.rows


ONE = Load("1 client", 1, 1)
EIGHT = Load("8 clients", 8, 1)
MANY = Load("64 clients", 64, 1)
BULK = Load("128 rows x 1", 1, 128)
BULK_BY_FOUR = Load("128 rows x 4", 4, 128)
LARGE_BULK = Load("1024 rows x 1", 1, 1024)
LOADS = (ONE, EIGHT, MANY, BULK, BULK_BY_FOUR, LARGE_BULK)

# One request of 1,024 images would take a minute on a small machine.
LOADS_OF = {"tiny": LOADS, "cnn": LOADS, "imagenet": (ONE, EIGHT, MANY, BULK, BULK_BY_FOUR)}


class Target(msgspec.Struct, frozen=True):
    """The least share of plain raw to reach in a cell, and Triton's share where it was measured (0: it was not).

    Both are of members as PyTorch loads them, one after the other: what is there to serve, however we execute it.
    """

    share_of_plain: float = 0.0
    triton_share: float = 0.0


_REAL_NETWORKS = {
    ONE: Target(0.70),
    EIGHT: Target(0.94),
    MANY: Target(0.94),
    BULK: Target(0.90),
    BULK_BY_FOUR: Target(0.94),
}

TARGETS: dict[tuple[str, str, str], Target] = {
    **{
        ("tiny", "ours", load.name): target
        for load, target in {
            ONE: Target(0.36, 0.22),
            EIGHT: Target(0.28, 0.13),
            MANY: Target(0.18, 0.08),
            BULK: Target(0.50, 0.32),
            BULK_BY_FOUR: Target(0.78, 0.66),
            LARGE_BULK: Target(0.70, 0.41),
        }.items()
    },
    ("tiny", "ours, zeromq", MANY.name): Target(0.15),
    **{("imagenet", "ours", load.name): target for load, target in _REAL_NETWORKS.items()},
    **{
        ("cnn", "ours", load.name): target
        for load, target in {
            **_REAL_NETWORKS,
            ONE: Target(0.70, 0.65),
            MANY: Target(0.94, 0.93),
            BULK: Target(0.90, 0.79),
        }.items()
    },
}
"""By workload, system and load. Triton's shares were measured once, with its python backend at its best settings per
load, on a machine of 2 cores; it is no Python package and cannot run beside us."""


def target_of(workload: str, system: str, load: Load) -> Target:
    """What to reach in a cell; zeros where nothing was promised."""
    return TARGETS.get((workload, system, load.name), Target())
