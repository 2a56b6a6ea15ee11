"""A worker process as a pod starts it: TCP ports, a mirror of the plan, a folder of keys, a state folder."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble_contract.plan import WorkerAddress
from tests.support.data_plane import STOP_S, Child, wait_until
from tests.support.link_pairs import free_port

START_S = 90.0


class PodWorker(Child):
    """`folder` stands for the pod's volumes; `host` for its address."""

    def __init__(
        self, folder: Path, name: str, *, device: Sequence[str] = ("cpu-0", "--threads", "1"), host: str = "127.0.0.1",
        keys: Path | None = None, ports: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.host, self.mirror, self.token = name, host, folder / "plan.json", ""
        self.ports = self.admin_port, data_port = ports or (free_port(), free_port())
        shown = f"[{host}]" if ":" in host else host
        self.address = WorkerAddress(name, f"tcp://{shown}:{data_port}")
        self.state_dir = folder / f"{name}-state"
        arguments = ["ensemble_worker", "serve", "--name", name, "--device", *device]
        arguments += ["--admin", f"tcp://{shown}:{self.admin_port}", "--data", self.address.address]
        arguments += ["--mirror", str(self.mirror), "--state-dir", str(self.state_dir)]
        arguments += ["--cache-dir", str(self.state_dir / "models")]
        arguments += ["--keys", str(keys)] if keys else []
        super().__init__(arguments, folder / f"{name}.log")

    def ask(self, method: str, target: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        """One request to its admin API; status and what the answer's JSON says (the text of /metrics)."""
        connection = http.client.HTTPConnection(self.host, self.admin_port, timeout=20)
        token = self.token if token is None else token
        content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        try:
            connection.request(method, target, content, {"Authorization": f"Bearer {token}"} if token else {})
            with connection.getresponse() as response:
                answer = response.read()
                return response.status, answer.decode() if target == "/metrics" else json.loads(answer)
        finally:
            connection.close()

    def wait_up(self) -> None:
        """Wait until the admin API answers."""
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.text()
            try:
                assert self.ask("GET", "/v1/health")[0] == 200
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def plan(self) -> dict[str, Any]:
        """What GET /v1/plan tells."""
        status, found = self.ask("GET", "/v1/plan")
        assert status == 200, found
        assert isinstance(found, dict)
        return found

    def states(self) -> dict[str, str]:
        """The state of each member's instance."""
        return {one["member"]: one["state"] for one in self.plan()["instances"]}

    def wait_states(self, wanted: dict[str, str], within_s: float = STOP_S) -> None:
        """Wait until its instances are these."""
        wait_until(lambda: self.states() == wanted, within_s)
