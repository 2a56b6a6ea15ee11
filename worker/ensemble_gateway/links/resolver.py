"""Names of workers to addresses, off the event loop and never in libzmq, whose one thread a bad answer would stall.

A look-up may take many seconds when a name server is away. Threads of our own keep it from everything else: names that
are found at once do not wait for those that are not, and a process that ends waits for none.
"""

from __future__ import annotations

import asyncio
import ipaddress
import queue
import socket
import threading
from collections.abc import Callable

MAX_THREADS = 32

Lookup = Callable[[str], list[str]]
_Asked = tuple[str, asyncio.AbstractEventLoop, "asyncio.Future[list[str]]"]


def addresses_of(name: str) -> list[str]:
    """The addresses of a name by the system's resolver, in its order.

    Raises OSError or UnicodeError if there are none.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Resolver:
    """Looks names up, as many at a time as there are threads; `lookup` blocks."""

    def __init__(self, lookup: Lookup = addresses_of) -> None:
        self._lookup = lookup
        self._asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._threads = 0
        self._waiting = 0

    async def resolve(self, name: str) -> list[str]:
        """The addresses of a name; that of an address is itself.

        Raises OSError or UnicodeError if there are none.
        """
        try:
            return [str(ipaddress.ip_address(name))]
        except ValueError:
            pass
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[str]] = loop.create_future()
        self._waiting += 1
        if self._waiting > self._threads and self._threads < MAX_THREADS:
            self._threads += 1
            threading.Thread(target=self._run, name=f"resolver-{self._threads}", daemon=True).start()
        self._asked.put((name, loop, future))
        try:
            return await future
        finally:
            self._waiting -= 1

    def _run(self) -> None:
        while True:
            name, loop, future = self._asked.get()
            if future.cancelled():
                continue
            found: list[str] = []
            error: Exception | None = None
            try:
                found = self._lookup(name)
            except (OSError, UnicodeError) as problem:
                error = problem
            try:
                loop.call_soon_threadsafe(_tell, future, found, error)
            except RuntimeError:
                # The loop is closed: the process ends.
                return


def _tell(future: asyncio.Future[list[str]], found: list[str], error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(found)
