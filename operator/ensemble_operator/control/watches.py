"""Follows the children of all ensembles: a list and a watch per kind, filtered on the server, kept in a store.

A watch goes on where it ended; where the server has forgotten that point, the kind is listed again. While the server
is away a watch tries again every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ensemble_operator.control.cluster import Cluster
from ensemble_operator.control.errors import ClusterError, Expired, NotFound, Unavailable
from ensemble_operator.control.kinds import CHILDREN_SELECTOR, OPTIONAL, WATCHED, Key, Kind
from ensemble_operator.control.store import Store

log = logging.getLogger(__name__)

# As client-go: watches of different length, so that they do not all end at once.
MIN_WATCH_S, MAX_WATCH_S = 300, 600
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 4.0
# A kind that the cluster does not serve may be served after an upgrade.
UNSERVED_PAUSE_S = 600.0
# Longer than any silence, pause or list: a loop without a sign of life for so long is stuck.
STUCK_S = 600.0


@dataclass(slots=True)
class _Follower:
    """Where the following of one kind stands."""

    version: str = ""
    beat_s: float = 0.0
    synced: bool = False
    problem: ClusterError | None = None
    failures: int = 0


class Watches:
    """Keeps a store true; calls `on_change` with each ensemble whose children changed in a way that matters.

    `on_doubt` is called when something may have happened unseen: the server was away, or has forgotten.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        on_change: Callable[[Key], None],
        *,
        namespace: str | None = None,
        on_doubt: Callable[[], None] = lambda: None,
    ) -> None:
        self.relists: Counter[str] = Counter()
        self._cluster = cluster
        self._store = store
        self._on_change = on_change
        self._on_doubt = on_doubt
        self._namespace = namespace or None
        self._followers = {kind: _Follower() for kind in WATCHED}
        self._all_synced = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        async with asyncio.TaskGroup() as group:
            for kind in self._followers:
                group.create_task(self._follow(kind), name=f"watch {kind.plural}")

    async def synced(self) -> None:
        """Wait until every kind has been listed once."""
        await self._all_synced.wait()

    def problems(self) -> list[str]:
        """Why kinds cannot be followed now."""
        return [str(follower.problem) for follower in self._followers.values() if follower.problem is not None]

    def stuck(self) -> list[str]:
        """Kinds whose loop shows no sign of life, although it is never silent for so long even without a server."""
        now = asyncio.get_running_loop().time()
        return [kind.plural for kind, f in self._followers.items() if f.beat_s and now - f.beat_s > STUCK_S]

    async def _follow(self, kind: Kind) -> None:
        follower = self._followers[kind]
        while True:
            self._beat(follower)
            try:
                await self._step(kind, follower)
            except Expired:
                follower.version = ""
                self._on_doubt()
                await asyncio.sleep(FIRST_PAUSE_S)
            except NotFound as error:
                if kind not in OPTIONAL:
                    await self._stumble(kind, follower, error)
                    continue
                self._synced(follower)
                await self._rest(follower, UNSERVED_PAUSE_S)
            except ClusterError as error:
                await self._stumble(kind, follower, error)

    async def _step(self, kind: Kind, follower: _Follower) -> None:
        """List if need be, then watch until the server ends it."""
        if not follower.version:
            self.relists[kind.plural] += 1
            listed, follower.version = await self._cluster.list_with_version(kind, self._namespace, CHILDREN_SELECTOR)
            for key in self._store.replace(kind, listed, follower.version):
                self._on_change(key)
            self._synced(follower)
        began_s = asyncio.get_running_loop().time()
        duration_s = random.randint(MIN_WATCH_S, MAX_WATCH_S)  # noqa: S311
        async for change, found in self._cluster.watch(
            kind, self._namespace, CHILDREN_SELECTOR, follower.version, duration_s
        ):
            self._beat(follower)
            self._recovered(follower)
            follower.version = found.get("metadata", {}).get("resourceVersion", follower.version)
            if change in ("OPENED", "BOOKMARK"):
                continue
            touched = self._store.remove(found) if change == "DELETED" else self._store.note(found)
            if touched is not None:
                self._on_change(touched)
        if asyncio.get_running_loop().time() - began_s < MIN_WATCH_S / 60:
            # A proxy that ends watches at once would have us ask without end.
            await asyncio.sleep(FIRST_PAUSE_S)

    async def _stumble(self, kind: Kind, follower: _Follower, error: ClusterError) -> None:
        self._tell(kind, follower, error)
        if follower.problem is None:
            self._on_doubt()
        follower.problem = error
        follower.failures += 1
        pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** min(follower.failures, 10))
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311

    def _tell(self, kind: Kind, follower: _Follower, error: ClusterError) -> None:
        """Each refusal once; that the server is away once for all kinds."""
        if type(error) is type(follower.problem):
            return
        if not isinstance(error, Unavailable):
            log.error("cannot follow %s, and try again: %s", kind.plural, error)
        elif not any(isinstance(each.problem, Unavailable) for each in self._followers.values()):
            log.warning("the API server does not answer: %s", error)

    async def _rest(self, follower: _Follower, pause_s: float) -> None:
        give_up = asyncio.get_running_loop().time() + pause_s
        while (left_s := give_up - asyncio.get_running_loop().time()) > 0:
            self._beat(follower)
            await asyncio.sleep(min(left_s, STUCK_S / 4))

    def _beat(self, follower: _Follower) -> None:
        follower.beat_s = asyncio.get_running_loop().time()

    def _synced(self, follower: _Follower) -> None:
        follower.synced = True
        if all(each.synced for each in self._followers.values()):
            self._all_synced.set()

    def _recovered(self, follower: _Follower) -> None:
        if follower.problem is None:
            return
        follower.problem, follower.failures = None, 0
        if not self.problems():
            log.info("all children are followed again")
