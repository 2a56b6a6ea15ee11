"""Addresses of this machine: whether the public one can be listened on, and free ones for our own processes."""

from __future__ import annotations

import errno
import socket

from ensemble_operator.errors import EnsembleError


class AddressUnavailable(EnsembleError):
    """The public address cannot be listened on; the message says why and what to do."""


def check_address(host: str, port: int) -> None:
    """Listen for a moment: a port in use should be known before minutes of downloading and measuring.

    Raises AddressUnavailable.
    """
    where = f"{host}:{port}"
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(1)
    except socket.gaierror as error:
        raise AddressUnavailable(f"{where}: --host is not an address of this machine: {error.strerror}") from error
    except OSError as error:
        advice = {
            errno.EADDRINUSE: "in use: stop what listens there, or choose another --port (0: any free one)",
            errno.EACCES: "no permission: ports below 1024 need privileges, choose another --port",
            errno.EADDRNOTAVAIL: "--host is not an address of this machine",
        }.get(error.errno or 0, str(error))
        raise AddressUnavailable(f"{where}: {advice}") from error


def free_tcp_address() -> str:
    """A loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"
