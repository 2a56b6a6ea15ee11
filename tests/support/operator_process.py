"""`ensemble operator` as a process of its own, which a test may kill and start again.

It says it is always the same pod, as a container is that starts again: it need not wait for the end of its lease.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.components import dies_with_us
from tests.support.tiny_operator import ROOT

END_S = 60.0


class OperatorProcess:
    """Serves one namespace; pods are processes of this machine, asked at their own addresses."""

    def __init__(self, kubeconfig: Path, namespace: str, folder: Path, *, allow_overrides: bool = False) -> None:
        self.log = folder / "operator.log"
        settings = {
            "NAMESPACE": namespace,
            "POD_NAMESPACE": namespace,
            "POD_NAME": "operator",
            "WORKER_IMAGE": "worker:test",
            "GATEWAY_IMAGE": "gateway:test",
            "WORKER_HOST": "{ip}",
            "METRICS_PORT": "0",
            "HEALTH_PORT": "0",
            "LOG_FORMAT": "text",
            "ALLOW_OVERRIDES": str(allow_overrides).lower(),
        }
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | {
            f"ENSEMBLE_OPERATOR_{name}": text for name, text in settings.items()
        }
        self._command = dies_with_us(
            sys.executable, "-m", "ensemble_operator", "operator", "--kubeconfig", str(kubeconfig)
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self.runs, self.text()
        self._stop(signal.SIGKILL)

    def end(self) -> int | None:
        """SIGTERM; the exit code."""
        return self._stop(signal.SIGTERM)

    def text(self) -> str:
        """What it has logged in all its lives."""
        return self.log.read_text() if self.log.exists() else ""

    def defects(self) -> list[str]:
        """Lines of its log that tell of an error which nobody had thought of."""
        return [line for line in self.text().splitlines() if "unexpected; tried again" in line or "Traceback" in line]

    def _stop(self, number: signal.Signals) -> int | None:
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(END_S)


@contextlib.contextmanager
def operator_process(
    kubeconfig: Path, namespace: str, folder: Path, *, allow_overrides: bool = False
) -> Iterator[OperatorProcess]:
    """One that runs, and is killed at the end if it still does."""
    operator = OperatorProcess(kubeconfig, namespace, folder, allow_overrides=allow_overrides)
    operator.start()
    try:
        yield operator
    finally:
        if operator.runs:
            operator.kill()
