"""The executor: receives batches, runs them, answers.

On a CPU device it runs one batch at a time in its own thread, so that nothing is handed from thread to thread; on a GPU
each instance has a thread (and a stream) of its own. Gateways take turns. An instance that leaves is first withdrawn
(no gateway is told of it any more), then removed, when the batches that were received for it are answered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add
from queue import SimpleQueue

from ensemble_contract.wire import FailureCode
from ensemble_worker.errors import DeviceLost
from ensemble_worker.gather import Array
from ensemble_worker.links import LinkServer, Peer, Work
from ensemble_worker.predictor import Predictor, is_out_of_memory, running_models
from ensemble_worker.stacks import Stacks

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Running:
    """An instance that can be given batches, and what it has done so far.

    `began_ns`: when the batch that it runs now began (monotonic), 0 when it runs none.
    """

    id: int
    member: str
    digest: str
    predictor: Predictor
    latency_s: float
    batches: int = 0
    rows: int = 0
    compute_ns: int = 0
    failures: int = 0
    began_ns: int = 0
    withdrawn: bool = False
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
        # Replaced, never changed: the executor's thread reads it while others come and go.
        self._instances: dict[int, Running] = {}
        # Replaced too; what it does not know runs alone.
        self.stacks = Stacks({})
        self._changing = threading.Lock()
        self._leaving: dict[int, tuple[Running | None, Callable[[], None]]] = {}
        self._threads: list[threading.Thread] = []
        self._waiting: dict[Peer, deque[Work]] = {}
        self._stopped = False

    def add(self, running: Running) -> None:
        """Accept batches for an instance."""
        with self._changing:
            self._instances = {**self._instances, running.id: running}
            if self._serial or self._stopped:
                return
            running.queue = SimpleQueue()
            thread = threading.Thread(target=self._run_queue, args=([running],), name=running.member, daemon=True)
            thread.start()
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]

    def remove(self, instance: int, done: Callable[[], None] | None = None) -> None:
        """Let go of an instance when the batches that were received for it have run; `done` is called then.

        Batches that come later are failed as unknown. `done` may be called from any thread, also within this call.
        """
        done = done or _nothing
        with self._changing:
            waits = self.is_alive() and not self._stopped
            if waits:
                self._leaving[instance] = self._instances.get(instance), done
        if waits and self._serial:
            self._server.wake()
            return
        running = self.discard(instance)
        if running is not None:
            running.queue.put(None)
        if not waits:
            done()

    def discard(self, instance: int) -> Running | None:
        """Accept no more batches for an instance, at once: also those that wait are failed as unknown."""
        with self._changing:
            running = self._instances.get(instance)
            self._instances = {id_: kept for id_, kept in self._instances.items() if id_ != instance}
        return running

    def instances(self) -> list[Running]:
        """The instances that gateways are told of."""
        return [running for running in self._instances.values() if not running.withdrawn]

    def waiting_batches(self) -> int:
        """Batches received that have not begun."""
        queued = sum(running.queue.qsize() for running in list(self._instances.values()))
        return queued + sum(len(queue) for queue in list(self._waiting.values()))

    def busy_s(self) -> float:
        """For how long the oldest batch that runs now has been running; 0 when none does."""
        leaving = [running for running, _ in list(self._leaving.values()) if running is not None]
        began = [began_ns for running in [*self._instances.values(), *leaving] if (began_ns := running.began_ns)]
        return (time.monotonic_ns() - min(began)) * 1e-9 if began else 0.0

    def stop(self) -> None:
        """End after the batches that run now."""
        with self._changing:
            self._stopped = True
        self._server.wake()

    def run(self) -> None:
        """The thread: receive, then run one batch for each gateway in turn."""
        try:
            with running_models():
                while not self._stopped:
                    self._turn()
        except Exception as error:
            self._give_up(error)
        self._end()

    def _turn(self) -> None:
        """Receive what there is, and run one batch of the gateway whose turn it is."""
        waiting = self._waiting
        parting = self._serial and bool(self._leaving)
        for work in self._server.receive(block=not waiting and not parting):
            waiting.setdefault(work.peer, deque()).append(work)
        if parting:
            self._let_go()
        if not waiting:
            return
        peer, queue = next(iter(waiting.items()))
        work = queue.popleft()
        del waiting[peer]
        if queue:
            waiting[peer] = queue
        self._start(work)

    def _let_go(self) -> None:
        """Part with the instances that leave and have nothing waiting."""
        needed = {one for queue in self._waiting.values() for work in queue for one in work.run.instances}
        for instance in [one for one in list(self._leaving) if one not in needed]:
            self.discard(instance)
            self._leaving.pop(instance)[1]()

    def _end(self) -> None:
        """End the instances' threads after their batches, and wait for nobody else."""
        with self._changing:
            self._stopped = True
            threads = list(self._threads)
        for running in self._instances.values():
            running.queue.put(None)
        for thread in threads:
            thread.join()
        while self._leaving:
            self._leaving.popitem()[1][1]()

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

    def _run_queue(self, handed: list[Running]) -> None:
        """An instance's thread. `handed` is emptied: when it is done, nothing here shall keep a model in memory."""
        running = handed.pop()
        instance = running.id
        try:
            with running_models():
                while (work := running.queue.get()) is not None and not self._stopped:
                    self._execute([running], work)
        except Exception as error:
            self._give_up(error)
        del running
        left = self._leaving.pop(instance, None)
        if left is not None:
            done = left[1]
            del left
            done()

    def _execute(self, instances: list[Running], work: Work) -> None:
        """Run a batch through each of the instances: its rows are gathered once."""
        # Kept, for they are taken from the peer when its gateway goes.
        held = work.peer.rows
        if not held.slots:
            return
        # By the position of their first instance.
        pieces: list[Sequence[Array] | None] = [None] * len(instances)
        compute_ns = [0] * len(instances)
        running = first = instances[0]
        began_ns = first.began_ns = lap_ns = time.monotonic_ns()
        try:
            rows = held.gather(work.run.ranges)
            for positions, run in self.stacks.parts(work.run.instances, work.run.rows):
                running = instances[positions[0]]
                ran = [running.predictor.run(rows)] if run is None else run(rows)
                now_ns = time.monotonic_ns()
                for position in positions:
                    compute_ns[position] = (now_ns - lap_ns) // len(positions)
                # One piece of them all, or one of each.
                for position, piece in zip(positions[: len(ran)], ran, strict=True):
                    pieces[position] = piece
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
            first.began_ns = 0
        # Before the answer: who has read it finds it counted.
        for running, lap_ns in zip(instances, compute_ns, strict=True):
            running.batches += 1
            running.rows += work.run.rows
            running.compute_ns += lap_ns
        given = [piece for piece in pieces if piece is not None]
        work.peer.answer(work.run, given, compute_ns, began_ns - work.received_ns)


def _nothing() -> None:
    """Nobody waits."""
