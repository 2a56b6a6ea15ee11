"""Columns of the allocation matrix: one for each version of a member that some plan in use serves. Pure.

A version keeps its column for as long as a plan needs it, so that requests of a former plan and of the present one
share queues and batches; a column that nobody needs any more is given to the next version.
"""

from __future__ import annotations

from collections.abc import Iterable

# Of one plan with the most members, and of another that replaces all of them.
MAX_COLUMNS = 128

Version = tuple[str, str]


class Columns:
    """Which column a (member, digest) pair has; `names` has the member's name by column."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.of: dict[Version, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self.names)

    def room_for(self, versions: Iterable[Version]) -> bool:
        """Whether every version can have a column."""
        new = sum(version not in self.of for version in versions)
        return new <= len(self._free) + MAX_COLUMNS - len(self.names)

    def add(self, version: Version) -> int:
        """The column of a version that has none yet."""
        if self._free:
            column = self._free.pop()
            self.names[column] = version[0]
        else:
            column = len(self.names)
            self.names.append(version[0])
        self.of[version] = column
        return column

    def drop(self, columns: Iterable[int]) -> None:
        """Nobody needs these columns any more."""
        gone = set(columns)
        self.of = {version: column for version, column in self.of.items() if column not in gone}
        self._free += gone
