"""The executor: receives batches, runs them, answers.

On a CPU device it runs one batch at a time in its own thread, so that nothing is handed from thread to thread; on a GPU
each instance has a thread (and a stream) of its own. Gateways take turns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import add
from queue import SimpleQueue

from ensemble_contract.wire import FailureCode
from ensemble_worker.errors import DeviceLost
from ensemble_worker.links import LinkServer, Peer, Work
from ensemble_worker.predictor import Predictor, is_out_of_memory

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Running:
    """An instance that can be given batches, and what it has done so far."""

    id: int
    member: str
    digest: str
    predictor: Predictor
    latency_s: float
    batches: int = 0
    rows: int = 0
    compute_ns: int = 0
    failures: int = 0
    queue: SimpleQueue[Work | None] = field(default_factory=SimpleQueue)


class Executor(threading.Thread):
    """Runs what the links receive. `serial`: in this thread, one batch at a time.

    `lost` is called when the device is lost, and when a thread here cannot go on: the worker has to end then.
    """

    def __init__(self, server: LinkServer, *, serial: bool, lost: Callable[[str], None]) -> None:
        super().__init__(name="executor", daemon=True)
        self._server = server
        self._serial = serial
        self._lost = lost
        self._instances: dict[int, Running] = {}
        self._waiting: dict[Peer, deque[Work]] = {}
        self._stopped = False
        self._began_ns = 0

    def add(self, running: Running) -> None:
        """Accept batches for an instance."""
        self._instances = {**self._instances, running.id: running}
        if not self._serial:
            threading.Thread(target=self._run_queue, args=(running,), name=running.member, daemon=True).start()

    def remove(self, instance: int) -> Running | None:
        """Accept no more batches for an instance; those that come are failed as unknown."""
        running = self._instances.get(instance)
        self._instances = {id_: kept for id_, kept in self._instances.items() if id_ != instance}
        if running is not None and not self._serial:
            running.queue.put(None)
        return running

    def instances(self) -> list[Running]:
        """The instances that accept batches."""
        return list(self._instances.values())

    def busy_s(self) -> float:
        """For how long the batch that runs now has been running; 0 when none does."""
        began_ns = self._began_ns
        return (time.monotonic_ns() - began_ns) * 1e-9 if began_ns else 0.0

    def stop(self) -> None:
        """End after the batch that runs now."""
        self._stopped = True
        self._server.wake()

    def run(self) -> None:
        """The thread: receive, then run one batch for each gateway in turn."""
        waiting = self._waiting
        try:
            while not self._stopped:
                for work in self._server.receive(block=not waiting):
                    waiting.setdefault(work.peer, deque()).append(work)
                if not waiting:
                    continue
                peer, queue = next(iter(waiting.items()))
                work = queue.popleft()
                del waiting[peer]
                if queue:
                    waiting[peer] = queue
                self._start(work)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """End the worker: its heartbeats would go on, and gateways would wait for a thread that has ended."""
        if self._stopped:
            return
        _LOG.error("%s cannot go on", threading.current_thread().name, exc_info=error)
        self._lost(str(error) if isinstance(error, DeviceLost) else f"{type(error).__name__}: {error}")

    def _start(self, work: Work) -> None:
        run, rows, known = work.run, work.peer.rows, self._instances
        if not rows.slots:
            return  # the gateway has gone
        instances = [running for one in run.instances if (running := known.get(one)) is not None]
        if len(instances) != len(run.instances):
            missing = next(one for one in run.instances if one not in known)
            work.peer.fail(run, FailureCode.UNKNOWN_INSTANCE, f"instance {missing} is not here")
        elif len(set(run.instances)) != len(instances):
            work.peer.fail(run, FailureCode.BAD_REQUEST, "it names an instance twice")
        elif run.rows > min(running.predictor.batch_size for running in instances):
            work.peer.fail(run, FailureCode.BAD_REQUEST, f"{run.rows} rows are over an instance's batch size")
        elif max(map(add, run.ranges.starts, run.ranges.counts)) > rows.slots:
            work.peer.fail(run, FailureCode.BAD_REQUEST, f"a range ends beyond slot {rows.slots}")
        elif self._serial:
            self._execute(instances, work)
        elif len(instances) == 1:
            instances[0].queue.put(work)
        else:
            work.peer.fail(run, FailureCode.BAD_REQUEST, "instances of a parallel device run one by one")

    def _run_queue(self, running: Running) -> None:
        try:
            while (work := running.queue.get()) is not None:
                self._execute([running], work)
        except Exception as error:
            self._give_up(error)

    def _execute(self, instances: list[Running], work: Work) -> None:
        """Run a batch through each of the instances: its rows are gathered once."""
        # Kept, for they are taken from the peer when its gateway goes.
        held = work.peer.rows
        if not held.slots:
            return
        began_ns = self._began_ns = lap_ns = time.monotonic_ns()
        outputs, compute_ns = [], []
        running = instances[0]
        try:
            rows = held.gather(work.run.ranges)
            for running in instances:
                outputs.append(running.predictor.run(rows))
                now_ns = time.monotonic_ns()
                compute_ns.append(now_ns - lap_ns)
                lap_ns = now_ns
        except DeviceLost as error:
            work.peer.fail(work.run, FailureCode.DEVICE_LOST, str(error))
            self._lost(str(error))
            return
        except Exception as error:
            running.failures += 1
            code = FailureCode.OUT_OF_MEMORY if is_out_of_memory(error) else FailureCode.MODEL_ERROR
            _LOG.warning("member %s failed on a batch of %d rows: %s", running.member, work.run.rows, error)
            work.peer.fail(work.run, code, f"{type(error).__name__}: {error}")
            return
        finally:
            self._began_ns = 0
        work.peer.answer(work.run, outputs, compute_ns, began_ns - work.received_ns)
        for running, lap_ns in zip(instances, compute_ns, strict=True):
            running.batches += 1
            running.rows += work.run.rows
            running.compute_ns += lap_ns
