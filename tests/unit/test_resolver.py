"""Names are looked up beside the event loop, and a look-up that hangs holds up nobody else."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from ensemble_gateway.links.resolver import MAX_THREADS, Resolver, addresses_of


async def test_an_address_is_its_own_and_is_never_looked_up() -> None:
    def lookup(name: str) -> list[str]:
        raise AssertionError(name)

    resolver = Resolver(lookup)
    assert await resolver.resolve("10.0.0.7") == ["10.0.0.7"]
    assert await resolver.resolve("fd00::7") == ["fd00::7"]


async def test_the_systems_resolver_is_asked() -> None:
    assert set(await Resolver().resolve("localhost")) <= {"127.0.0.1", "::1"}
    with pytest.raises(socket.gaierror):
        addresses_of("no-such-host.invalid")
    with pytest.raises(OSError, match=r"."):
        await Resolver().resolve("no-such-host.invalid")
    with pytest.raises(UnicodeError):
        await Resolver().resolve("a" * 70 + ".invalid")


async def test_names_that_hang_hold_up_neither_others_nor_the_loop() -> None:
    release = threading.Event()

    def lookup(name: str) -> list[str]:
        if name.startswith("slow"):
            release.wait(20)
        return ["10.0.0.1"]

    resolver = Resolver(lookup)
    hanging = [asyncio.create_task(resolver.resolve(f"slow-{i}")) for i in range(MAX_THREADS - 1)]
    await asyncio.sleep(0)
    began = time.monotonic()
    for i in range(50):
        assert await resolver.resolve(f"fast-{i}") == ["10.0.0.1"]
    assert time.monotonic() - began < 5
    assert not any(task.done() for task in hanging)
    hanging[0].cancel()
    release.set()
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*hanging, return_exceptions=True)
    assert answers[1:] == [["10.0.0.1"]] * (MAX_THREADS - 2)
