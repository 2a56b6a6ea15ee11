"""A pod's life on a node without containers: its one container as a local process, restarts, probes, status, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.components import dies_with_us
from tests.support.kubelet_volumes import Missing, Objects, Volumes, environment_of, local_command, local_path

Manifest = Mapping[str, Any]

# Real kubelets probe once a period; who waits for a pod to start here is looked after sooner.
EAGER_PROBE_S = 0.1
# Real kubelets start again after 10 s, 20 s, ...: here it is a hundredth.
BACK_OFF_S = 0.1
MAX_BACK_OFF_S = 3.0
SETTLED_S = 10.0
MESSAGE_BYTES = 2048


class PodProcess:
    """A pod on this node. `changed` is called when its status may have; `status` is what to report."""

    def __init__(
        self, pod: Manifest, ip: str, folder: Path, extra: Mapping[str, str], claims: Mapping[str, Path]
    ) -> None:
        self.pod, self.ip, self.folder = pod, ip, folder
        self.container: Manifest = pod["spec"]["containers"][0]
        self.log = folder / "log"
        self.process: asyncio.subprocess.Process | None = None
        self.changed: Callable[[], None] = lambda: None
        self.restarts = 0
        self._volumes = Volumes(pod, folder / "volumes", claims)
        self._extra = extra
        self._state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self._last: dict[str, Any] = {}
        self._started = self._ready = False
        self._ready_since = _now()
        self._tasks: list[asyncio.Task[None]] = []
        self._objects_changed = asyncio.Event()

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.pod["metadata"]["uid"])

    def start(self, objects: Callable[[], Objects]) -> None:
        """Begin to run it."""
        self.folder.mkdir(parents=True)
        self._tasks = [asyncio.create_task(self._live(objects)), asyncio.create_task(self._probe())]

    def objects_changed(self, objects: Objects) -> None:
        """A ConfigMap or Secret of the namespace is different: mounted files follow at once."""
        self._objects_changed.set()
        with contextlib.suppress(Missing):
            self._volumes.sync(objects)

    def kill(self) -> None:
        """The container is killed, as when it runs out of memory; it is started again."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self, grace_s: float, pre_stop_s: float = 0.0) -> None:
        """Stop as a kubelet does: preStop, SIGTERM, the grace period, SIGKILL."""
        wanted = ((self.container.get("lifecycle") or {}).get("preStop") or {}).get("sleep") or {}
        deadline = time.monotonic() + grace_s
        await asyncio.sleep(min(float(wanted.get("seconds", 0)), pre_stop_s, grace_s))
        live, probe = self._tasks
        live.cancel()
        probe.cancel()
        await asyncio.wait(self._tasks)
        process = self.process
        if process is not None and process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), max(0.0, deadline - time.monotonic()))
            self.kill()
            await process.wait()
        self._volumes.remove()

    def status(self) -> dict[str, Any]:
        """The pod's status; conditions are merged by type."""
        ready: dict[str, Any] = {"status": str(self._ready), "lastTransitionTime": self._ready_since}
        if not self._ready:
            ready |= {"reason": "ContainersNotReady", "message": f"containers with unready status: [{self.name}]"}
        else:
            ready |= {"reason": None, "message": None}
        container = {
            "name": self.container["name"],
            "image": self.container["image"],
            "imageID": "",
            "containerID": f"process://{self.process.pid}" if self.process is not None else "",
            "ready": self._ready,
            "started": self._started,
            "restartCount": self.restarts,
            "state": self._state,
            "lastState": self._last,
        }
        return {
            "phase": "Pending" if self.process is None else "Running",
            "hostIP": "127.0.0.1",
            "podIP": self.ip,
            "podIPs": [{"ip": self.ip}],
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "ContainersReady", **ready},
                {"type": "Ready", **ready},
            ],
            "containerStatuses": [container],
        }

    async def _live(self, objects: Callable[[], Objects]) -> None:
        failures = 0
        while True:
            env, command = await self._prepared(objects)
            began = time.monotonic()
            code = await self._run(command, env)
            failures = 1 if time.monotonic() - began > SETTLED_S else failures + 1
            self._died(code)
            await asyncio.sleep(0 if failures == 1 else min(BACK_OFF_S * 2**failures, MAX_BACK_OFF_S))
            self.restarts += 1

    async def _prepared(self, objects: Callable[[], Objects]) -> tuple[dict[str, str], list[str]]:
        while True:
            self._objects_changed.clear()
            try:
                self._volumes.sync(objects())
                variables = environment_of(self.pod, self.container, self.ip, objects())
                break
            except Missing as missing:
                self._set({"waiting": {"reason": "ContainerCreating", "message": str(missing)}})
            await self._objects_changed.wait()
        folders = self._volumes.folders(self.container)
        base = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        if "/tmp" in folders:
            base["TMPDIR"] = str(folders["/tmp"])
        env = {**base, **{key: local_path(value, folders) for key, value in variables.items()}, **self._extra}
        return env, local_command(self.container, self.ip, env, folders)

    async def _run(self, command: list[str], env: Mapping[str, str]) -> int:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *dies_with_us(*command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                cwd=self.folder,
                start_new_session=True,
            )
        self._set({"running": {"startedAt": _now()}})
        code = await self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return code

    def _died(self, code: int) -> None:
        message = self.log.read_bytes()[-MESSAGE_BYTES:].decode(errors="replace")
        number = code if code >= 0 else 128 - code
        ended = {"exitCode": number, "reason": "Error" if code else "Completed", "message": message}
        self._last = {"terminated": {**ended, "finishedAt": _now()}}
        self._set_ready(started=False, ready=False)
        said = f"back-off restarting failed container {self.container['name']} in pod {self.name}"
        self._set({"waiting": {"reason": "CrashLoopBackOff", "message": said}})

    async def _probe(self) -> None:
        """Startup until it succeeds, then readiness and liveness, each in its own period."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            failed: dict[str, int] = {}
            due: dict[str, float] = {}
            while True:
                await asyncio.sleep(EAGER_PROBE_S)
                if "running" not in self._state:
                    failed, due = {}, {}
                    continue
                names = ("readinessProbe", "livenessProbe") if self._started else ("startupProbe",)
                for name in names:
                    probe = self.container.get(name)
                    if probe is not None and time.monotonic() < due.get(name, 0.0):
                        continue
                    good = probe is None or await self._ask(session, probe)
                    failed[name] = 0 if good else failed.get(name, 0) + 1
                    eager = name == "startupProbe" or (name == "readinessProbe" and not self._ready)
                    due[name] = time.monotonic() + (EAGER_PROBE_S if eager else (probe or {}).get("periodSeconds", 10))
                    self._judge(name, good, failed[name] * (EAGER_PROBE_S if eager else 1), probe or {})

    def _judge(self, name: str, good: bool, failures: float, probe: Manifest) -> None:
        over = failures >= probe.get("failureThreshold", 3)
        if name == "startupProbe" and good:
            self._set_ready(started=True, ready=self._ready)
        elif name == "readinessProbe" and (good or (over and self._ready)):
            self._set_ready(started=True, ready=good)
        elif name != "readinessProbe" and over:
            self.kill()

    async def _ask(self, session: aiohttp.ClientSession, probe: Manifest) -> bool:
        get = probe["httpGet"]
        ports = {port.get("name"): port["containerPort"] for port in self.container.get("ports", [])}
        url = f"http://{self.ip}:{ports.get(get['port'], get['port'])}{get['path']}"
        timeout = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
        try:
            async with session.get(url, timeout=timeout) as response:
                return response.status < 400
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _set(self, state: dict[str, Any]) -> None:
        if state != self._state:
            self._state = state
            self.changed()

    def _set_ready(self, *, started: bool, ready: bool) -> None:
        if (started, ready) == (self._started, self._ready):
            return
        if ready != self._ready:
            self._ready_since = _now()
        self._started, self._ready = started, ready
        self.changed()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
