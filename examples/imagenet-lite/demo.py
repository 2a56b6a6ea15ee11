"""Serves the ImageNet ensemble on a free port, asks it what is on a photograph, and stops it: `make demo`.

Exits with 0 only if the answer came and everything that was started has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
READY_TIMEOUT_S = 120.0
CLIENT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
SERVED_AT = re.compile(r" is served at http://([^/]+)/")


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


@contextlib.contextmanager
def served(file: Path) -> Iterator[str]:
    """A served ensemble, as `host:port`; its allocation matrix is printed when it is ready.

    Raises DemoFailed if it is not ready in time, ends by itself or has to be killed.
    """
    command = [str(Path(sys.executable).with_name("ensemble")), "serve", str(file), "--port", "0"]
    # A session of its own: Ctrl-C then reaches this script alone, which stops the server once.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield await_ready(server)
    finally:
        server.terminate()
        try:
            code = server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            raise DemoFailed(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s and was killed") from None
    if code != 0:
        raise DemoFailed(f"the server ended with exit code {code}")


def await_ready(server: subprocess.Popen[str]) -> str:
    """Pass on what the server says until it is ready; its `host:port`.

    Raises DemoFailed if it ends or the time is up.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=read_lines, args=(server, lines), daemon=True).start()
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise DemoFailed(f"the server was not ready within {READY_TIMEOUT_S:.0f} s") from None
        if line is None:
            raise DemoFailed(f"the server ended before it was ready, with exit code {server.wait(STOP_TIMEOUT_S)}")
        print(line, end="", flush=True)
        if found := SERVED_AT.search(line):
            return found[1]


def read_lines(server: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Queue the server's lines, then None; reading goes on to the end, so that the server never waits for a reader."""
    if server.stdout is not None:
        for line in server.stdout:
            lines.put(line)
    lines.put(None)


def ask(address: str, request: Path) -> None:
    """Run the example's client.

    Raises DemoFailed if it fails or takes too long.
    """
    command = [sys.executable, str(HERE / "client.py"), "--url", address, "--save-request", str(request)]
    try:
        subprocess.run(command, check=True, timeout=CLIENT_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise DemoFailed(f"the client ended with exit code {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"the client had no answer within {CLIENT_TIMEOUT_S:.0f} s") from error


def print_next_steps(port: int, request: Path) -> None:
    """What to type next."""
    print("\nNext: leave it running with")
    print("  make serve" + ("" if port == 8000 else f" PORT={port}"))
    print("and, in another terminal, ask it for the best five classes of the same photograph:")
    print(
        f"  curl -s http://localhost:{port}/v2/models/imagenet/infer "
        f"-H 'Content-Type: application/json' --data-binary @{request}"
    )


def main() -> int:
    """Serve, ask, stop; the exit code."""
    parser = argparse.ArgumentParser(description="Serve the ImageNet ensemble, classify a photograph, stop.")
    parser.add_argument("--request", type=Path, default=Path("build/cat.json"), help="where curl's request is written")
    parser.add_argument("--port", type=int, default=8000, help="of `make serve`, for the curl line to try next")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with served(HERE / "ensemble.yaml") as address:
            print()
            ask(address, options.request)
    except DemoFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print_next_steps(options.port, options.request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
