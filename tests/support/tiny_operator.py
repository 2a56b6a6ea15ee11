"""The operator's process with a small reconcile, for tests of all that is around it.

For each ensemble it keeps a ConfigMap NAME-plan with the members' names and the count of its reconciles, and a status;
`annotations.slow` makes a reconcile take that many seconds. Started with `python -m tests.support.tiny_operator`;
settings come from the environment, the cluster from KUBECONFIG.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ensemble_operator.control.kinds import (
    CONFIG_MAP,
    ENSEMBLE,
    ENSEMBLE_LABEL,
    FIELD_MANAGER,
    MANAGED_BY,
    Key,
    Manifest,
)
from ensemble_operator.control.logs import set_up
from ensemble_operator.control.process import operate
from ensemble_operator.control.settings import Settings
from ensemble_operator.control.world import Outcome, World
from tests.support.components import dies_with_us
from tests.support.control_plane import ControlPlane

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0


class TinyReconciler:
    """Reads from the store; writes only what differs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rounds = 0

    async def reconcile(self, key: Key) -> Outcome:
        self._rounds += 1
        ensemble = self._world.store.ensemble(key)
        if ensemble is None:
            return Outcome()
        annotations = ensemble["metadata"].get("annotations") or {}
        await asyncio.sleep(float(annotations.get("slow", "0")))
        wanted = self._plan(key, ensemble)
        live = self._world.store.child(CONFIG_MAP, key, wanted["metadata"]["name"])
        if live is None or live["data"]["members"] != wanted["data"]["members"]:
            await self._world.cluster.apply(wanted)
        if (ensemble.get("status") or {}).get("phase") != "Ready":
            await self._world.cluster.apply_status(
                {
                    "apiVersion": ENSEMBLE.api_version,
                    "kind": ENSEMBLE.name,
                    "metadata": {"namespace": key.namespace, "name": key.name},
                    "status": {"phase": "Ready", "devices": {"wanted": 2, "held": 1}},
                }
            )
            await self._world.cluster.event(ensemble, "Normal", "Ready", "all is well", "Report")
        return Outcome()

    async def close(self) -> None:
        pass

    def _plan(self, key: Key, ensemble: Manifest) -> Manifest:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": f"{key.name}-plan",
                "namespace": key.namespace,
                "labels": {MANAGED_BY: FIELD_MANAGER, ENSEMBLE_LABEL: key.name},
                "ownerReferences": [
                    {
                        "apiVersion": ENSEMBLE.api_version,
                        "kind": ENSEMBLE.name,
                        "name": key.name,
                        "uid": ensemble["metadata"]["uid"],
                        "controller": True,
                        "blockOwnerDeletion": False,
                    }
                ],
            },
            "data": {
                "members": ",".join(member["name"] for member in ensemble["spec"]["members"]),
                "round": str(self._rounds),
                "by": self._world.settings.pod_name,
            },
        }


class TinyOperator:
    """A running process of it."""

    def __init__(self, kubeconfig: Path, name: str, log: Path, settings: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        environment = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig),
            "ENSEMBLE_OPERATOR_POD_NAME": name,
            "ENSEMBLE_OPERATOR_METRICS_PORT": "0",
            "ENSEMBLE_OPERATOR_HEALTH_PORT": "0",
            **{f"ENSEMBLE_OPERATOR_{setting}": text for setting, text in settings.items()},
        }
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                dies_with_us(sys.executable, "-m", "tests.support.tiny_operator"),
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far; a line that is no JSON is a defect."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def said(self, text: str) -> bool:
        return any(text in line["message"] for line in self.lines())

    def wait_said(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        try:
            until(lambda: self.said(text), f"{self.name} to say {text!r}", deadline_s)
        except AssertionError as error:
            error.add_note(self.log.read_text()[-4000:])
            raise

    def ask(self, path: str) -> tuple[int, str]:
        """One of its HTTP endpoints: status and text."""
        said = next(line["message"] for line in self.lines() if line["message"].startswith("health on port"))
        health, metrics = (int(word.strip(",")) for word in said.split() if word.strip(",").isdecimal())
        connection = http.client.HTTPConnection("127.0.0.1", metrics if path == "/metrics" else health, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of the first sample that starts with `name`."""
        lines = self.ask("/metrics")[1].splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def end(self, number: signal.Signals = signal.SIGTERM, deadline_s: float = 60.0) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(deadline_s)


@contextlib.contextmanager
def tiny_operator(kubeconfig: Path, folder: Path, name: str, **settings: str) -> Iterator[TinyOperator]:
    """Start one; killed at the end if it still runs."""
    operator = TinyOperator(kubeconfig, name, folder / f"{name}.log", settings)
    try:
        yield operator
    finally:
        if operator.process.poll() is None:
            operator.process.kill()
            operator.process.wait(10)


def until(holds: Any, what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until something holds; an answer that is not there yet (Refused) does not hold."""
    give_up = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < give_up, f"waited {deadline_s:g} s in vain for {what}"
        time.sleep(0.05)


def make_ensemble(
    plane: ControlPlane, namespace: str, name: str, *members: str, annotations: Mapping[str, str] | None = None
) -> Manifest:
    """Create an InferenceEnsemble, or give it other members."""
    manifest = {
        "apiVersion": ENSEMBLE.api_version,
        "kind": ENSEMBLE.name,
        "metadata": {"name": name, "namespace": namespace, "annotations": dict(annotations or {})},
        "spec": {
            "members": [{"name": member, "model": {"uri": f"file:///{member}.pt2"}} for member in members],
            "devices": {"count": 1},
        },
    }
    path = ENSEMBLE.path(namespace, name) + "?fieldManager=user&force=true"
    found: Manifest = plane.ask("PATCH", path, manifest, "application/apply-patch+yaml")
    return found


def main() -> None:
    settings = Settings.from_environment(os.environ)
    set_up(settings.log_format, settings.log_level)
    asyncio.run(operate(settings, Path(os.environ["KUBECONFIG"]), None, TinyReconciler))


if __name__ == "__main__":
    main()
