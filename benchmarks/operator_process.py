"""The operator as a process of its own under measurement: what its metrics port says, and what the kernel says."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import psutil
from tests.support.components import dies_with_us

from benchmarks.operator_figures import Reading, read_page

START_S, END_S = 30.0, 30.0
SAMPLE_S = 0.25


class OperatorProcess:
    """`ensemble operator` with a kubeconfig, until `end`. `settings` are its environment, without the prefix."""

    def __init__(self, kubeconfig: Path, settings: Mapping[str, str], log: Path) -> None:
        self._log = log
        environment = {name: text for name, text in os.environ.items() if not name.startswith("ENSEMBLE_OPERATOR_")}
        chosen = {"METRICS_PORT": "0", "HEALTH_PORT": "0", **settings}
        environment |= {f"ENSEMBLE_OPERATOR_{name}": text for name, text in chosen.items()}
        command = (sys.executable, "-m", "ensemble_operator", "operator", "--kubeconfig", str(kubeconfig))
        with log.open("wb") as file:
            self._process = subprocess.Popen(dies_with_us(*command), env=environment, stdout=file, stderr=file)
        self._page_url = ""
        self.peak_bytes = self.peak_with_children_bytes = 0

    async def started(self) -> None:
        """Wait for its metrics.

        Raises SystemExit with the end of its log if it does not run.
        """
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            if found := re.search(r"metrics on port (\d+)", self._log.read_text()):
                self._page_url = f"http://127.0.0.1:{found[1]}/metrics"
                return
            await asyncio.sleep(0.05)
        raise SystemExit(f"the operator does not run:\n{self._log.read_text()[-4000:]}")

    async def reading(self) -> Reading:
        """Its counters now.

        Raises aiohttp.ClientError if it has ended.
        """
        async with aiohttp.ClientSession() as session, session.get(self._page_url) as answer:
            return read_page(await answer.text(), time.monotonic())

    async def sample(self) -> None:
        """Note the peaks of its memory until cancelled: alone, and with its children (the planning process)."""
        while self._process.poll() is None:
            own = self.resident_bytes
            self.peak_bytes = max(self.peak_bytes, own)
            self.peak_with_children_bytes = max(self.peak_with_children_bytes, own + sum(self._children_bytes()))
            await asyncio.sleep(SAMPLE_S)

    @property
    def resident_bytes(self) -> int:
        """Its memory now."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def ended_children_cpu_s(self) -> float:
        """CPU seconds of its children that have ended."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.children_user + times.children_system)

    def end(self) -> None:
        """Ask it to end, and see that it does."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _children_bytes(self) -> list[int]:
        found = []
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                found.append(int(child.memory_info().rss))
            except psutil.NoSuchProcess:
                continue
        return found
