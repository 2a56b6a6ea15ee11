"""What a running gateway watches in its folders: a newer plan in the mirror, and new keys or a new token."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from ensemble_contract.keys import Credentials, stamp_of
from ensemble_contract.plan import GatewayPlan
from ensemble_contract.planfile import Mirror
from ensemble_gateway.gateway import Gateway, StalePlan

_LOG = logging.getLogger(__name__)

LOOK_S = 2.0


class Token:
    """The admin API's token: that of the keys' folder where it has one, else the one given at the start."""

    def __init__(self, given: str, found: str = "") -> None:
        self._given = given
        self.found = found

    def __call__(self) -> str:
        """What requests must carry now; empty: nothing."""
        return self.found or self._given


class KeysFolder:
    """The folder of a Secret: `first` is what it has now, and `look` reads it when a file was replaced.

    Raises ValueError, naming the file, if it cannot be used now.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Before its first look, so that nothing is missed that is replaced meanwhile.
        self._stamp = stamp_of(folder)
        self._trouble = ""
        self.first = Credentials.read(folder)

    def look(self) -> Credentials | None:
        """What is new in it; None if nothing is, or if it cannot be read (which is logged once)."""
        stamp = stamp_of(self._folder)
        if stamp == self._stamp:
            return None
        try:
            found = Credentials.read(self._folder)
        except ValueError as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                _LOG.warning("the keys cannot be read, and the former stay: %s", error)
            return None
        self._stamp, self._trouble = stamp, ""
        return found


async def follow_folders(
    gateway: Gateway, token: Token, mirror: Mirror[GatewayPlan] | None, keys: KeysFolder | None
) -> None:
    """Look every 2 s, in a thread, until cancelled.

    Links take new keys when they connect next: a session outlives its keys, and workers, which may have the new ones
    sooner or later than this pod, end it when they change theirs.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        if mirror is not None:
            plan = await asyncio.to_thread(mirror.look)
            if plan is not None and (gateway.newest is None or plan.generation >= gateway.newest.generation):
                try:
                    gateway.adopt(plan)
                except StalePlan as error:
                    _LOG.warning("the mirror's plan is not taken: %s", error)
        if keys is not None:
            found = await asyncio.to_thread(keys.look)
            if found is not None:
                take_credentials(gateway, token, found)


def take_credentials(gateway: Gateway, token: Token, found: Credentials) -> None:
    """Use new keys for new connections, and a new token for new requests; encryption is never given up."""
    token.found = found.token or token.found
    if found.keys is None and gateway.keys is not None:
        _LOG.warning("the folder of keys has none any more: the former stay")
    elif found.keys != gateway.keys:
        gateway.keys = found.keys
        _LOG.info("new keys are used for new connections")
