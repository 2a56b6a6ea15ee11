"""Gateway and workers of one ensemble as processes of this machine: started, observed, restarted, drained."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.plan import EnsemblePlan, GatewayPlan, WorkerPlan, encode_plan
from ensemble_contract.pod import PLAN_FILE
from ensemble_operator.addresses import AddressUnavailable
from ensemble_operator.errors import EnsembleError
from ensemble_operator.exits import ExitCode, describe
from ensemble_operator.fleet import Fleet, GatewayState, Refused, Unreachable, WorkerReport
from ensemble_operator.keys import GATEWAY_KEYS, WORKER_KEYS
from ensemble_operator.processes import Ended, Happening, KeptProcess, Program, Wrote
from ensemble_operator.profiles.measurements import Device
from ensemble_operator.serve.observation import Observed, Rates, worker_state
from ensemble_operator.tables import DeviceView, LiveView

GATEWAY = "gateway"
WORKER_GRACE_S = 5.0
# Beyond the deadline of the requests that it still has.
GATEWAY_GRACE_S = 5.0
LONGEST_DRAIN_S = 60.0


class PlanNotKept(EnsembleError):
    """A plan cannot be written for the processes, or is too large; they go on with the former one."""


class GatewayFailed(EnsembleError):
    """The gateway ends each time it is started; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the processes meet: the private folder of sockets and plans, what is kept, and the public address."""

    folder: Path
    models: Path
    keys: Path | None
    host: str
    port: int
    log_level: str


class Deployment:
    """The processes that serve one ensemble, and the plan that they serve."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        plan: EnsemblePlan,
        place: Place,
        say: Callable[[str, str], None],
    ) -> None:
        """A worker for every row of the plan; `devices` by worker.

        `say` takes the name of a process and a line about it. Nothing is started yet.
        """
        self.plan = plan
        self._place, self._say = place, say
        self._fleet = Fleet()
        self._last_words: dict[str, str] = {}
        self._last_codes: dict[str, int] = {}
        addresses = {worker.name: worker.address for worker in plan.gateway.workers}
        self._workers = {
            name: KeptProcess(self._worker_program(devices[name], addresses[name]), self._happened)
            for name in plan.rows
        }
        self._gateway = KeptProcess(self._gateway_program(), self._happened)

    def start(self) -> None:
        """Write the plan and start every process with it: one that comes back starts with the newest.

        Raises PlanNotKept.
        """
        self._write(self.plan)
        for process in (self._gateway, *self._workers.values()):
            process.start()

    async def push(self, plan: EnsemblePlan) -> None:
        """Replace the plan; it must have the same workers.

        Written first, then told: a process that does not answer now finds it by itself. Raises PlanNotKept.
        """
        self._write(plan)
        self.plan = plan
        self._gateway.program = self._gateway_program()
        tellings = [self._tell(name, plan.row(name)) for name in self._workers]
        await asyncio.gather(*tellings, self._tell(GATEWAY, plan.gateway))

    async def observe(self) -> Observed:
        """Ask every process how it is.

        Raises AddressUnavailable or GatewayFailed if the gateway is given up.
        """
        if self._gateway.gave_up:
            raise self._gateway_error()
        workers = asyncio.gather(*(self._worker_report(name) for name in self._workers))
        gateway, reports = await asyncio.gather(self._gateway_state(), workers)
        given_up = {
            name: f"worker {name} {describe(self._last_codes[name])}: {self._last_words[name]}"
            for name, process in self._workers.items()
            if process.gave_up
        }
        return Observed(gateway, dict(zip(self._workers, reports, strict=True)), given_up)

    def view(self, observed: Observed, lately: Rates) -> LiveView:
        """What was observed, for people; `lately` is what was answered since the last time."""
        state = observed.gateway
        in_flight = {worker.name: worker.in_flight for worker in state.workers} if state else {}
        live = {member.name: member.live for member in state.members} if state else {}
        return LiveView(
            url=state.url if state else "the gateway is away",
            rows_per_s=lately.rows_per_s,
            p50_s=lately.p50_s,
            p99_s=lately.p99_s,
            requests=state.requests if state else 0,
            failures=sum(state.failures.values()) if state else 0,
            store_bytes=state.store_bytes if state else 0,
            gateway_restarts=self._gateway.restarts,
            members={member.name: live.get(member.name, False) for member in self.plan.gateway.members},
            devices=tuple(
                DeviceView(
                    name=name,
                    state=worker_state(
                        observed.workers[name], running=process.pid is not None, given_up=process.gave_up
                    ),
                    instances=", ".join(f"{i.member} x{i.batch_size}" for i in self.plan.row(name).instances) or "-",
                    in_flight=in_flight.get(name, 0),
                    restarts=process.restarts,
                )
                for name, process in self._workers.items()
            ),
        )

    async def stop(self) -> None:
        """Drain and end everything: the gateway first, so that its last requests still find workers."""
        try:
            await self._gateway.stop()
            await asyncio.gather(*(process.stop() for process in self._workers.values()))
        finally:
            self.kill()
            await self._fleet.close()

    def kill(self) -> None:
        """End everything at once. `stop` afterwards reaps it."""
        for process in (self._gateway, *self._workers.values()):
            process.kill()

    def _happened(self, happening: Happening) -> None:
        if isinstance(happening, Wrote):
            self._say(happening.name, happening.line)
        elif isinstance(happening, Ended):
            name, code = happening.name, happening.life.code
            self._last_codes[name] = code
            self._last_words[name] = next((line for line in reversed(happening.lines) if line.strip()), "no last words")
            if happening.restart_in_s is None:
                self._say(name, f"{describe(code)} and is given up")
            else:
                self._say(name, f"{describe(code)}; starts again in {happening.restart_in_s:.1f} s")

    async def _gateway_state(self) -> GatewayState | None:
        if self._gateway.pid is None:
            return None
        try:
            state = await self._fleet.gateway(self._admin(GATEWAY))
        except Unreachable:
            return None
        if not self._gateway.ready:
            self._gateway.mark_ready()
            # A port that the system chose is kept: clients know it now.
            self._place = replace(self._place, port=int(state.url.rpartition(":")[2]))
            self._gateway.program = self._gateway_program()
        return state

    async def _worker_report(self, name: str) -> WorkerReport | None:
        process = self._workers[name]
        if process.pid is None:
            return None
        try:
            report = await self._fleet.worker(self._admin(name))
        except Unreachable:
            return None
        if any(instance.state == "ready" for instance in report.instances):
            process.mark_ready()
        return report

    def _gateway_error(self) -> EnsembleError:
        words = self._last_words[GATEWAY]
        if self._last_codes[GATEWAY] == ExitCode.ADDRESS_UNAVAILABLE:
            return AddressUnavailable(words)
        return GatewayFailed(f"the gateway {describe(self._last_codes[GATEWAY])}: {words}")

    def _write(self, plan: EnsemblePlan) -> None:
        draft = self._place.folder / f"{PLAN_FILE}.new"
        try:
            draft.write_bytes(encode_plan(plan))
            draft.replace(self._place.folder / PLAN_FILE)
        except (OSError, InvalidPlan) as error:
            raise PlanNotKept(f"the plan cannot be written to {draft}: {error}") from error

    async def _tell(self, name: str, plan: WorkerPlan | GatewayPlan) -> None:
        try:
            await self._fleet.put_plan(self._admin(name), plan)
        except Refused as error:
            self._say(name, f"does not take the plan: {error}")
        except Unreachable:
            # It starts, hangs or starts again: either way it reads the written plan.
            return

    def _admin(self, name: str) -> str:
        return f"unix:{self._place.folder / name}.admin"

    def _common(self, name: str, keys_name: str) -> tuple[str, ...]:
        keys = ("--keys", str(self._place.keys / keys_name)) if self._place.keys else ()
        plan = ("--mirror", str(self._place.folder / PLAN_FILE))
        parent = ("--parent-pid", str(os.getpid()))
        return ("--admin", self._admin(name), *plan, *keys, *parent, "--log-level", self._place.log_level)

    def _worker_program(self, device: Device, data_address: str) -> Program:
        cores = ("--cores", ",".join(map(str, device.cores)), "--pin") if device.cores else ()
        arguments = (
            *(sys.executable, "-m", "ensemble_worker", "serve", "--name", device.name, "--device", device.name, *cores),
            *("--data", data_address, "--cache-dir", str(self._place.models), *self._common(device.name, WORKER_KEYS)),
        )
        return Program(device.name, arguments, WORKER_GRACE_S)

    def _gateway_program(self) -> Program:
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        address = f"{host}:{self._place.port}"
        arguments = (sys.executable, "-m", "ensemble_gateway", "--http", address, *self._common(GATEWAY, GATEWAY_KEYS))
        return Program(GATEWAY, arguments, min(LONGEST_DRAIN_S, self.plan.gateway.timeout_s + GATEWAY_GRACE_S))
