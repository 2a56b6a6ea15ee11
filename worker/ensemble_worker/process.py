"""The worker process: one device, its links, its admin API, and the plan that it runs."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from ensemble_contract.errors import InvalidPlan
from ensemble_contract.keys import KeyFiles
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import ModelSource, WorkerPlan, decode_plan, encode_plan, source_of
from ensemble_contract.wire import LiveInstance, State
from ensemble_worker import devices, predictor, storage
from ensemble_worker.admin import make_admin
from ensemble_worker.arguments import device_of, parser
from ensemble_worker.errors import DeviceLost, WorkerError
from ensemble_worker.gather import HostRows
from ensemble_worker.links import LinkServer, Rows
from ensemble_worker.links.shared import SharedServer
from ensemble_worker.links.zeromq import ZeroMQServer
from ensemble_worker.loop import Executor, Running

_LOG = logging.getLogger(__name__)

CREDITS = 2
EXIT_DEVICE_LOST = 70
EXIT_ADDRESS = 6
LAST_BATCH_S = 5.0
PLAN_FILE = "plan.json"


@dataclass(slots=True, eq=False)
class Placed:
    """An instance of the plan on its way to run."""

    source: ModelSource
    batch_size: int
    state: str = "fetching"
    error: str = ""
    running: Running | None = None
    memory_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "member": self.source.name,
            "digest": self.source.digest,
            "batchSize": self.batch_size,
            "state": self.state,
            "error": self.error,
            "memoryBytes": self.memory_bytes,
        }


class Worker:
    """Runs the newest plan it was given on its device; links exist from the first plan on, which tells the tensors."""

    def __init__(self, device: devices.Device, options: argparse.Namespace, lost: asyncio.Event) -> None:
        self.device = device
        self.overhead_bytes = _resident_bytes()
        self._options = options
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._ids = count(1)
        self._plan: WorkerPlan | None = None
        self._placed: dict[tuple[str, str, int], Placed] = {}
        self._server: LinkServer | None = None
        self._executor: Executor | None = None
        self._loading: asyncio.Task[None] | None = None

    @property
    def generation(self) -> int:
        """The plan's generation; 0 without a plan."""
        return self._plan.generation if self._plan is not None else 0

    def adopt(self, plan: WorkerPlan) -> bool:
        """Run a newer plan; False if it is older than the present one.

        Instances that both plans have go on undisturbed; others end at once; new ones are loaded one after the other.
        The same plan once more has those tried again that could not be loaded.
        """
        former = self._plan
        if former is not None and plan.generation < former.generation:
            return False
        if plan == former:
            self._try_failed_again(plan)
            return True
        self._plan = plan
        self._keep(plan)
        if self._server is None or former is None or (former.inputs, former.outputs) != (plan.inputs, plan.outputs):
            self._open_links(plan)
        self._drop_unplanned(plan)
        if self._loading is not None:
            self._loading.cancel()
        self._loading = self._loop.create_task(self._load_planned(plan))
        return True

    def _try_failed_again(self, plan: WorkerPlan) -> None:
        busy = self._loading is not None and not self._loading.done()
        if not busy and any(placed.state == "failed" for placed in self._placed.values()):
            self._loading = self._loop.create_task(self._load_planned(plan))

    def instance_states(self) -> list[dict[str, Any]]:
        """Every instance of the plan with its state."""
        return [placed.as_json() for placed in self._placed.values()]

    def running(self) -> list[Running]:
        """The instances that accept batches."""
        return self._executor.instances() if self._executor is not None else []

    def busy_s(self) -> float:
        """For how long the batch that runs now has been running."""
        return self._executor.busy_s() if self._executor is not None else 0.0

    def close(self) -> bool:
        """Finish the batch that runs, say goodbye to gateways; False if a thread is left that cannot be stopped."""
        loading = self._loading is not None and not self._loading.done()
        if self._loading is not None:
            self._loading.cancel()
        return self._close_links() and not loading

    # -- links ----------------------------------------------------------------------------------------------------

    def _open_links(self, plan: WorkerPlan) -> None:
        self._close_links()
        self._placed.clear()
        server = self._make_server(plan)
        server.start()
        serial = self.device.kind == "cpu"
        self._server, self._executor = server, Executor(server, serial=serial, lost=self._device_lost)
        self._executor.start()

    def _close_links(self) -> bool:
        """Say goodbye to gateways; False if the batch that runs does not end."""
        ended = True
        if self._executor is not None:
            self._executor.stop()
            self._executor.join(timeout=LAST_BATCH_S)
            ended = not self._executor.is_alive()
        if self._server is not None:
            self._server.close()
        self._server = self._executor = None
        return ended

    def _make_server(self, plan: WorkerPlan) -> LinkServer:
        row_bytes = sum(spec.row_bytes for spec in plan.inputs)
        in_flight = CREDITS * sum(instance.batch_size for instance in plan.instances)
        cache_rows = max(plan.row_cache_bytes // row_bytes, in_flight)
        scheme, _, path = self._options.data.partition(":")
        on_gpu = self.device.kind != "cpu"

        def make_rows(rows: int) -> Rows:
            if on_gpu:
                return predictor.device_rows(self.device, plan.inputs, rows)
            return HostRows.cache(plan.inputs, rows)

        if scheme == "unix":
            return SharedServer(
                Path(path), plan.inputs, [spec.carried for spec in plan.outputs], self._state_for,
                make_rows if on_gpu else None, cache_rows,
            )  # fmt: skip
        keys = KeyFiles.read(self._options.keys) if self._options.keys else None
        return ZeroMQServer(self._options.data, plan.inputs, self._state_for, make_rows, cache_rows, keys)

    def _state_for(self, gateways: int, cache_rows: int) -> State:
        live = tuple(
            LiveInstance(one.id, one.member, one.digest, one.predictor.batch_size, one.latency_s)
            for one in self.running()
        )
        granted = max(1, CREDITS // max(1, gateways))
        serial = self.device.kind == "cpu"
        name = self._options.name
        return State(name, self.generation, live, serial, granted, cache_rows, self.device.device_class)

    def _device_lost(self, cause: str) -> None:
        _LOG.error("device %s is lost: %s", self.device.name, cause)
        self._loop.call_soon_threadsafe(self._lost.set)

    # -- instances ------------------------------------------------------------------------------------------------

    def _drop_unplanned(self, plan: WorkerPlan) -> None:
        wanted = {(one.member, source_of(plan.members, one).digest, one.batch_size) for one in plan.instances}
        gone = [key for key in self._placed if key not in wanted]
        for key in gone:
            placed = self._placed.pop(key)
            if placed.running is not None and self._executor is not None:
                self._executor.remove(placed.running.id)
        if gone and self._server is not None:
            self._server.broadcast()

    async def _load_planned(self, plan: WorkerPlan) -> None:
        missing = []
        for instance in plan.instances:
            source = source_of(plan.members, instance)
            key = (source.name, source.digest, instance.batch_size)
            placed = self._placed.get(key)
            if placed is None or placed.running is None:
                placed = self._placed[key] = Placed(source, instance.batch_size)
                missing.append(placed)
        for placed in missing:
            await self._load(plan, placed)

    async def _load(self, plan: WorkerPlan, placed: Placed) -> None:
        source = placed.source
        before = _resident_bytes()
        try:
            path = await asyncio.to_thread(
                storage.fetch, source, self._options.cache_dir, storage.log_progress(source.name)
            )
            placed.state = "loading"
            model, latency_s = await asyncio.to_thread(self._load_and_time, plan, placed, path)
        except DeviceLost as error:
            placed.state, placed.error = "failed", str(error)
            self._device_lost(str(error))
            return
        except WorkerError as error:
            placed.state, placed.error = "failed", str(error)
            _LOG.error("%s", error)  # the message says it all
            return
        except Exception as error:
            placed.state, placed.error = "failed", f"member {source.name!r} ({source.uri}): {error}"
            _LOG.exception("member %s cannot be loaded", source.name)
            return
        if self._executor is None or self._server is None:
            return
        placed.running = Running(next(self._ids), source.name, source.digest, model, latency_s)
        placed.memory_bytes = max(0, _resident_bytes() - before)
        placed.state = "ready"
        self._executor.add(placed.running)
        self._server.broadcast()

    def _load_and_time(self, plan: WorkerPlan, placed: Placed, path: Path) -> tuple[predictor.Predictor, float]:
        """Load and warm up an instance, then time one full batch of zeros."""
        model = predictor.load(
            path, placed.source, plan.inputs, plan.outputs, self.device, placed.batch_size, self._options.cache_dir
        )
        rows = HostRows.cache(plan.inputs, placed.batch_size).zeros()
        began = time.perf_counter()
        model.run(rows)
        return model, time.perf_counter() - began

    # -- the plan on disk -----------------------------------------------------------------------------------------

    def _keep(self, plan: WorkerPlan) -> None:
        """Write the plan where a restarted worker finds it."""
        folder: Path | None = self._options.state_dir
        if folder is None:
            return
        draft = folder / f"{PLAN_FILE}.new"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(encode_plan(plan))
            draft.replace(folder / PLAN_FILE)
        except OSError as error:
            _LOG.warning("the plan is not kept for a restart: %s", error)


def newest_plan(files: Sequence[Path | None]) -> WorkerPlan | None:
    """The plan of the highest generation among the files that exist; what cannot be read is logged and passed over."""
    found = []
    for file in files:
        if file is not None and file.exists():
            try:
                found.append(decode_plan(file.read_bytes(), WorkerPlan))
            except (OSError, InvalidPlan) as error:
                _LOG.warning("%s is passed over: %s", file, error)
    return max(found, key=lambda plan: plan.generation, default=None)


async def serve(options: argparse.Namespace, device: devices.Device) -> int:
    """Serve until SIGTERM or SIGINT, or until the device is lost; the exit code.

    Raises OSError when an address cannot be bound.
    """
    loop = asyncio.get_running_loop()
    stop, lost = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    worker = Worker(device, options, lost)
    admin = web.AppRunner(make_admin(worker, os.environ.get("ENSEMBLE_ADMIN_TOKEN", "")), access_log=None)
    await admin.setup()
    try:
        await _site(admin, options.admin).start()
        state = options.state_dir / PLAN_FILE if options.state_dir else None
        plan = newest_plan([options.plan, state])
        if plan is not None:
            worker.adopt(plan)
        waits = [loop.create_task(event.wait()) for event in (stop, lost)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    finally:
        ended = worker.close()
        await admin.cleanup()
    code = EXIT_DEVICE_LOST if lost.is_set() else 0
    if not ended:
        # Python waits for threads, and this one may be in a download, in torch or in a driver for minutes.
        logging.shutdown()
        os._exit(code)
    return code


def main(arguments: list[str]) -> int:
    """`python -m ensemble_worker serve`: the exit code is 0 after SIGTERM, 6 for an address, 70 for a lost device."""
    options = parser().parse_args(arguments)
    die_with_parent(options.parent_pid)
    logging.basicConfig(level=options.log_level, format=f"%(asctime)s %(levelname)s {options.name} %(message)s")
    device = device_of(options)
    if device.kind == "cpu":
        predictor.prepare_cpu(device.cores, pin=options.pin)
    try:
        return asyncio.run(serve(options, device))
    except OSError as error:
        print(f"worker {options.name}: cannot listen: {error}", file=sys.stderr)  # noqa: T201  # the parent reads it
        return EXIT_ADDRESS


def _site(runner: web.AppRunner, address: str) -> web.BaseSite:
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        Path(rest).unlink(missing_ok=True)
        return web.UnixSite(runner, rest)
    host, _, port = rest.removeprefix("//").rpartition(":")
    return web.TCPSite(runner, host, int(port))


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
