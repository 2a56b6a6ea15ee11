"""The instances of a plan: fetched side by side, loaded one after the other, tried again where that may help.

What leaves the plan finishes what it was given, and its memory is free before anything new is loaded. What both plans
have is not touched.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from ensemble_contract.plan import ModelSource, WorkerPlan, source_of
from ensemble_worker import predictor, storage
from ensemble_worker.devices import Device
from ensemble_worker.errors import DeviceLost, ModelError, WorkerError
from ensemble_worker.gather import HostRows
from ensemble_worker.loop import Running
from ensemble_worker.serving import Serving, Tensors

_LOG = logging.getLogger(__name__)

FETCHES_AT_ONCE = 4
FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 300.0

T = TypeVar("T")
Key = tuple[ModelSource, int, Tensors, Tensors]


@dataclass(slots=True, eq=False)
class Placed:
    """An instance of the plan, on its way to run or to leave.

    `state`: fetching, loading, ready, failed (`error` says why) or draining. `memory_bytes` is what the process grew by
    while it was loaded: an indication; profiles are measured apart.
    """

    source: ModelSource
    batch_size: int
    inputs: Tensors
    outputs: Tensors
    state: str = "fetching"
    error: str = ""
    memory_bytes: int = 0
    attempts: int = 0
    model: predictor.Model | None = None
    running: Running | None = None
    task: asyncio.Task[None] | None = None
    again: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> Key:
        """What makes it the same instance in another plan."""
        return self.source, self.batch_size, self.inputs, self.outputs

    def as_json(self) -> dict[str, Any]:
        """As the admin API shows it."""
        return {
            "member": self.source.name,
            "digest": self.source.digest,
            "batchSize": self.batch_size,
            "state": self.state,
            "error": self.error,
            "memoryBytes": self.memory_bytes,
            "attempts": self.attempts,
        }


class Instances:
    """Brings what runs to what is planned.

    `links_fit` returns when the links serve the newest plan; `lost` is called when the device is lost, `left` with an
    instance that has run its last batch.
    """

    def __init__(
        self, device: Device, cache_dir: Path, serving: Serving,
        links_fit: Callable[[], Awaitable[None]], lost: Callable[[str], None], left: Callable[[Running], None],
    ) -> None:  # fmt: skip
        self._device = device
        self._cache_dir = cache_dir
        self._serving = serving
        self._links_fit = links_fit
        self._lost = lost
        self._left = left
        self._ids = count(1)
        self._placed: dict[Key, Placed] = {}
        self._leaving: dict[Placed, asyncio.Task[None]] = {}
        self._stacking: asyncio.Task[None] | None = None
        self._fetching = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._turn = asyncio.Lock()
        self._releasing = asyncio.Lock()

    def all(self) -> list[Placed]:
        """Every instance of the plan, and those that still leave."""
        return [*self._placed.values(), *self._leaving]

    @property
    def loading(self) -> bool:
        """Whether a thread is at work that cannot be stopped."""
        return any(one.state in ("fetching", "loading") for one in self.all())

    @property
    def settled(self) -> bool:
        """Whether each instance of the plan runs, or cannot: what is tried again may still come."""
        return all(one.state == "ready" or (one.task is not None and one.task.done()) for one in self._placed.values())

    def follow(self, plan: WorkerPlan, *, again: bool = False) -> None:
        """Run the instances of a plan. What failed is tried at once if that may have passed, or if told `again`."""
        wanted: dict[Key, Placed] = {}
        for instance in plan.instances:
            placed = Placed(source_of(plan.members, instance), instance.batch_size, plan.inputs, plan.outputs)
            wanted[placed.key] = self._placed.get(placed.key, placed)
        gone = [placed for key, placed in self._placed.items() if key not in wanted]
        self._placed = wanted
        for placed in gone:
            self._dismiss(placed)
        self._serving.tell()
        for placed in wanted.values():
            placed.again.set()
            if placed.task is None or (again and placed.state == "failed" and placed.task.done()):
                placed.task = asyncio.create_task(self._bring(placed))
        # Others may have waited for what is not wanted any more.
        self._stacking = asyncio.create_task(self._restack())

    def close(self) -> None:
        """Start nothing more."""
        for task in [self._stacking, *self._leaving.values(), *(one.task for one in self._placed.values())]:
            if task is not None:
                task.cancel()

    # -- leaving --------------------------------------------------------------------------------------------------

    def _dismiss(self, placed: Placed) -> None:
        """No gateway is told of it from now on."""
        if placed.state != "loading" and placed.task is not None:
            # A download goes on alone, into the cache.
            placed.task.cancel()
        if placed.running is None and placed.state != "loading":
            return
        if placed.running is not None:
            placed.running.withdrawn = True
            placed.state = "draining"
        self._leaving[placed] = asyncio.create_task(self._leave(placed))

    async def _leave(self, placed: Placed) -> None:
        try:
            if placed.running is None and placed.task is not None:
                # It is being loaded, which cannot be stopped.
                await asyncio.wait([placed.task])
                placed.state = "draining"
            if placed.running is not None:
                await self._serving.part_with(placed.running)
                self._left(placed.running)
            placed.running = placed.model = None
            await self._restack()
            await self._release_memory()
        finally:
            del self._leaving[placed]

    async def _release_memory(self) -> None:
        # One after the other: Python skips a collection that is asked for while another one runs.
        async with self._releasing:
            await asyncio.to_thread(predictor.release_memory, self._device)

    # -- coming ---------------------------------------------------------------------------------------------------

    async def _bring(self, placed: Placed) -> None:
        """Fetch and load an instance, again and again if what went wrong may pass."""
        delay_s = FIRST_RETRY_S
        while not await self._try(placed):
            await self._restack()
            placed.again.clear()
            try:
                await asyncio.wait_for(placed.again.wait(), delay_s)
            except TimeoutError:
                delay_s = min(2 * delay_s, LONGEST_RETRY_S)
        await self._restack()

    async def _restack(self) -> None:
        """Members of one architecture run as one, once nothing more is on its way."""
        if self.loading:
            return
        try:
            await self._serving.restack()
        except Exception:
            _LOG.exception("members of one architecture run one after the other")

    async def _try(self, placed: Placed) -> bool:
        """Whether nothing more is to be tried: the instance runs, or cannot."""
        if self._device.kind == "none":
            self._failed(placed, f"member {placed.source.name!r}: {self._device.error}")
            return True
        placed.state, placed.error = "fetching", ""
        placed.attempts += 1
        source = placed.source
        try:
            async with self._fetching:
                path = await _in_thread(storage.fetch, source, self._cache_dir, storage.log_progress(source.name))
            async with self._turn:
                while self._leaving:
                    await asyncio.wait(list(self._leaving.values()))
                placed.state = "loading"
                await self._load(placed, path)
        except DeviceLost as error:
            self._failed(placed, str(error))
            self._lost(str(error))
        except ModelError as error:
            self._failed(placed, str(error))
            _LOG.error("%s", error)  # the message says it all
            again = error.may_pass
            del error
            await self._release_memory()
            return not again
        except WorkerError as error:
            self._failed(placed, str(error))
            _LOG.error("%s", error)
        except Exception as error:
            unexpected = ModelError(source.name, source.uri, f"{type(error).__name__}: {error}")
            self._failed(placed, str(unexpected))
            _LOG.exception("%s", unexpected)
        return True

    def _failed(self, placed: Placed, error: str) -> None:
        placed.state, placed.error = "failed", error

    async def _load(self, placed: Placed, path: Path) -> None:
        before = predictor.memory_in_use(self._device)
        shared = next((one.model for one in self._placed.values() if _same_model(one, placed)), None)
        model, made, latency_s = await _in_thread(self._load_and_time, placed, path, shared)
        await self._links_fit()
        if self._placed.get(placed.key) is not placed:
            return
        source = placed.source
        placed.model = model
        placed.running = Running(next(self._ids), source.name, source.digest, made, latency_s)
        placed.memory_bytes = max(0, predictor.memory_in_use(self._device) - before)
        placed.state = "ready"
        self._serving.add(placed.running)

    def _load_and_time(
        self, placed: Placed, path: Path, shared: predictor.Model | None
    ) -> tuple[predictor.Model, predictor.Predictor, float]:
        """Load and warm up an instance, then time one full batch of zeros. Instances of one model share its weights."""
        predictor.prepare_thread()
        model = shared or predictor.read_known(
            path, placed.source, placed.inputs, placed.outputs, self._device, placed.batch_size, self._cache_dir
        )
        made = model.at(placed.batch_size)
        rows = HostRows.cache(placed.inputs, placed.batch_size).zeros()
        began = time.perf_counter()
        made.run(rows)
        return model, made, time.perf_counter() - began


def _same_model(one: Placed, other: Placed) -> bool:
    """Whether both run one model file as the same tensors, and it takes batches of any size."""
    same = (one.source, one.inputs, one.outputs) == (other.source, other.inputs, other.outputs)
    return same and one.model is not None and one.model.fitted.fixed_batch is None


async def _in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Run a call that may take minutes in a thread of its own, which nobody waits for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is

    def run() -> None:
        result, error = None, None
        try:
            result = call(*arguments)
        except BaseException as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=call.__name__, daemon=True).start()
    return await future
