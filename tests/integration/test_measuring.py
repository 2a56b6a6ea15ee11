"""The runner's side of measuring: real measuring processes, a real server to download from, results kept on disk."""

from __future__ import annotations

import http.server
import io
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from rich.console import Console

from ensemble_contract.plan import ModelSource
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.profiles.measuring import Measurer, Task
from ensemble_operator.serve.downloads import Downloads
from tests.support import models

# A machine that does other things besides loads torch for minutes.
pytestmark = pytest.mark.timeout(600)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is the base class's
        """Silence."""


async def test_a_member_is_downloaded_with_a_line_measured_and_then_known(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    path = models.export_mlp(tmp_path / "web/m.pt2", seed=1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    said: list[str] = []
    source = ModelSource("cat", "d", f"http://127.0.0.1:{server.server_address[1]}/m.pt2", "torch-export")
    task = Task(source, True, (), (), (1, 8), 60.0)
    try:
        with Downloads(said.append, Console(file=io.StringIO())) as downloads:
            devices = (Device("cpu-0", "cpu", "K", 1 << 30, (0,)),)
            measurer = Measurer(devices, tmp_path / "cache", downloads.note, downloads.advance)
            found = await measurer.measure({"cat": task})
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    mib = path.stat().st_size / 2**20
    assert said == ["measuring cat on cpu-0", f"cat: downloaded {mib:.1f} MiB of {mib:.1f} MiB (100 %)"]
    measured = found["cat", "K"]
    assert measured.error == ""
    assert [point.batch_size for point in measured.points] == [1, 8]
    assert all(point.memory_bytes > 0 and point.rows_per_s > 0 for point in measured.points)
    assert await measurer.measure({"cat": task}) == found
    assert len(said) == 2


async def test_further_sizes_are_told_by_what_is_known(tmp_path: Path) -> None:
    path = models.export_mlp(tmp_path / "m.pt2", seed=1)
    source = ModelSource("cat", "d", path.as_uri(), "torch-export")
    devices = (Device("cpu-0", "cpu", "K", 1 << 30, (0,)),)
    measurer = Measurer(devices, tmp_path / "cache", print)
    first = (await measurer.measure({"cat": Task(source, True, (), (), (1, 8), 30.0)}))["cat", "K"]
    (file,) = (tmp_path / "cache/profiles").glob("*.json")
    kept = msgspec.json.decode(file.read_bytes())
    # As if the machine had been a thousand times slower, at the size next to the one that is measured now.
    kept["measurement"]["points"][1]["latencyS"] *= 1000
    file.write_bytes(msgspec.json.encode(kept))
    whole = (await measurer.measure({"cat": Task(source, True, (), (), (1, 8, 16), 90.0)}))["cat", "K"]
    assert [point.batch_size for point in whole.points] == [1, 8, 16]
    assert 100 < whole.points[2].latency_s / first.points[1].latency_s < 10_000


RUNNER = """
import asyncio, sys
from pathlib import Path
from ensemble_contract.plan import ModelSource
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.profiles.measuring import Measurer, Task
source = ModelSource("cat", "d", sys.argv[1], "torch-export")
measurer = Measurer((Device("cpu-0", "cpu", "K", 1 << 30, (0,)),), Path(sys.argv[2]), print)
asyncio.run(measurer.measure({"cat": Task(source, False, (), (), (1,), 1.0)}))
"""
DEADLINE_S = 150.0


def test_a_runner_that_is_killed_while_it_measures_leaves_nothing(tmp_path: Path) -> None:
    """The measuring process hangs on a server that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(DEADLINE_S)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/m.pt2"
        with subprocess.Popen([sys.executable, "-c", RUNNER, uri, str(tmp_path)], stdout=subprocess.DEVNULL) as runner:
            try:
                connection, _ = server.accept()
                started = psutil.Process(runner.pid).children(recursive=True)
            finally:
                runner.kill()
        assert len(started) == 1
        with connection:
            deadline = time.monotonic() + DEADLINE_S
            while started[0].is_running() and started[0].status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.02)
