"""CURVE key pairs for gateways and workers. The only file of the control plane that imports zmq."""

from __future__ import annotations

from pathlib import Path

import zmq

from ensemble_contract.keys import KeyFiles

GATEWAY_KEYS = "gateway"
WORKER_KEYS = "worker"


def new_pair() -> tuple[str, str]:
    """A new pair, public and secret, as text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def write_keys(folder: Path) -> None:
    """Make new pairs, one for all gateways and one for all workers, in two folders below `folder`.

    Raises OSError if they cannot be written.
    """
    gateway_public, gateway_secret = zmq.curve_keypair()
    worker_public, worker_secret = zmq.curve_keypair()
    KeyFiles(gateway_public, gateway_secret, worker_public).write(folder / GATEWAY_KEYS)
    KeyFiles(worker_public, worker_secret, gateway_public).write(folder / WORKER_KEYS)
