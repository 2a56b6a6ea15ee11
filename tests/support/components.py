"""Processes that tests start and that end with them, whatever happens; the ports and keys that they need."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

STOP_S = 30.0
# Below those that connections are given: one of these could take the port of a server that is away for a while.
PORTS = (15_000, 29_999)
# Of the controller manager, those that ensembles and their children need.
CONTROLLERS = (
    "statefulset-controller",
    "deployment-controller",
    "replicaset-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "disruption-controller",
    "resourceclaim-controller",
    "horizontal-pod-autoscaler-controller",
)

_DIES_WITH_US = """
import os, sys
from ensemble_contract.orphan import die_with_parent
die_with_parent(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


def dies_with_us(program: str | Path, *arguments: str) -> list[str]:
    """The command that runs a program which the kernel kills when the thread that starts it ends, however it does."""
    return [sys.executable, "-c", _DIES_WITH_US, str(os.getpid()), str(program), *arguments]


class Component:
    """One process of the control plane, with its log. It can be frozen, killed and started again."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self.command, self.log = name, command, log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it unless it runs."""
        if not self.runs:
            with self.log.open("ab") as stream:
                self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None, f"{self.name} was never started"
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, even frozen."""
        if self.process is not None and self.runs:
            self.process.kill()
            self.process.wait(STOP_S)

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"{self.name}:", *lines[-15:]])


def tails(components: Iterable[Component]) -> str:
    return "\n\n".join(component.tail() for component in components)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on just now; all held until the last is found, so that they differ."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            one, port = held.enter_context(socket.socket()), random.randint(*PORTS)
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
    return found


def write_signing_key(file: Path) -> None:
    """The key that service accounts' tokens are signed with."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    file.chmod(0o600)
