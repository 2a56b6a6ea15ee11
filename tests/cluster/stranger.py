"""Runs in a pod: what a process that knows these keys gets from a worker's data socket.

`stranger.py HOST SERVER_PUBLIC [OWN_PUBLIC OWN_SECRET]`, with keys of its own making if none are given, and without any
encryption if SERVER_PUBLIC is empty. Prints what the handshake came to: `admitted`, `refused`, `nothing` that tells, or
`unreachable` if nobody listens.
"""

from __future__ import annotations

import socket
import sys
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

PORT = 5555
WAIT_S = 6.0
REFUSED = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_DISCONNECTED,
}


def outcome(monitor: zmq.Socket[bytes]) -> str:
    """The first event that tells."""
    deadline, connected = time.monotonic() + WAIT_S, False
    while monitor.poll(int(max(0.0, deadline - time.monotonic()) * 1000)):
        event = recv_monitor_message(monitor)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return "admitted"
        if event in REFUSED:
            return "refused"
        connected = connected or event == zmq.EVENT_CONNECTED
    return "nothing" if connected else "unreachable"


def main(host: str, server: str, *own: str) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        if server:
            public, secret = (key.encode() for key in own) if own else zmq.curve_keypair()
            dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = server.encode(), public, secret
        monitor = dealer.get_monitor_socket()
        dealer.connect(f"tcp://{socket.gethostbyname(host)}:{PORT}")
        print(outcome(monitor), flush=True)
        dealer.disable_monitor()


if __name__ == "__main__":
    main(*sys.argv[1:])
