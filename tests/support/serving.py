"""`ensemble serve` as a child process of a test: started, spoken to, and ended whatever the test does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

START_S = 90.0
STOP_S = 60.0
SERVED_AT = re.compile(r"is served at (http://\S+)/v2/models/(\S+)")


class Served:
    """A running `ensemble serve`, with what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self.url = ""
        self.model = ""
        self._news = threading.Condition()
        for stream, lines in ((process.stdout, self.out), (process.stderr, self.err)):
            threading.Thread(target=self._read, args=(stream, lines), daemon=True).start()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._news:
                lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, pattern: str, lines: list[str], within_s: float = START_S) -> re.Match[str]:
        """Wait for a line with this pattern; AssertionError with all that was written when none comes."""
        deadline = time.monotonic() + within_s
        with self._news:
            while True:
                for line in lines:
                    if found := re.search(pattern, line):
                        return found
                left = deadline - time.monotonic()
                ended = self.process.poll() is not None
                if left <= 0 or ended:
                    raise AssertionError("\n".join([f"no {pattern!r}:", *self.out, *self.err]))
                self._news.wait(min(left, 0.2))

    def wait_until_served(self) -> None:
        """Wait for the summary."""
        found = self.wait_for(SERVED_AT.pattern, self.out)
        self.url, self.model = found[1], found[2]

    def children(self) -> list[psutil.Process]:
        """Everything that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self, name: str) -> psutil.Process:
        """The process of a worker."""
        return next(c for c in self.children() if "ensemble_worker" in c.cmdline() and name in c.cmdline())

    def ask(self, inputs: Mapping[str, Sequence[Sequence[float]]], **parameters: object) -> dict[str, Any]:
        """The answer to a JSON request of FP32 inputs, each a list of rows; `error` and `status` in it when refused."""
        tensors = [
            {"name": name, "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": rows}
            for name, rows in inputs.items()
        ]
        body = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
        request = urllib.request.Request(
            f"{self.url}/v2/models/{self.model}/infer", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = {**json.load(error), "status": error.code}
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


@contextmanager
def serving(
    file: Path, cache: Path, *arguments: str, port: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Start `ensemble serve FILE` on CPU devices; ended, with all its children, when the block is left."""
    command = [sys.executable, "-m", "ensemble_operator", "serve", str(file), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--cache-dir", str(cache), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ENSEMBLE_DEVICE": "cpu", **(environment or {})},
        start_new_session=True,
    )
    with process:
        try:
            yield Served(process)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def wait_until_gone(processes: Sequence[psutil.Process], within_s: float = STOP_S) -> None:
    """Wait until none of these processes runs; AssertionError naming those that do."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"still running: {[p.cmdline() for p in alive]}"
