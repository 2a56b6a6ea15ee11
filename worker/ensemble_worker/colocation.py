"""`python -m ensemble_worker colocate`: what a device gets done when members share it, against each of them alone.

Each member is run alone, then all together, as a worker runs them: on a GPU each in a thread and on a stream of its
own, on a CPU one batch at a time. The factor is the sum, over the members, of the share of its own pace that each keeps
among the others: the device time that they get together, in devices. 1 is perfect time sharing, less is interference,
more is overlap. Prints one JSON object, in at most the given time once the models are loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ensemble_contract.errors import ContractError
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec
from ensemble_worker import devices, predictor, storage
from ensemble_worker.errors import WorkerError
from ensemble_worker.gather import HostRows
from ensemble_worker.measured_device import add_device, device_of, give_way
from ensemble_worker.meter import prepare

BUDGET_S, LONGEST_S = 30.0, 60.0
# Of the time, for the members together; the rest is shared among those that run alone.
SHARE_TOGETHER = 0.5
# Alone and together alternate: what else the machine does meets both.
TURNS = 5
USAGE_EXIT = 1


class Shared(msgspec.Struct, frozen=True, rename="camel"):
    """A member and the batch size that it runs with beside others."""

    source: ModelSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_size: int


class Question(msgspec.Struct, frozen=True):
    """The members of a device."""

    members: tuple[Shared, ...]


class Factor(msgspec.Struct, frozen=True):
    """Batches a second of each member `alone` and `together`, and the co-location factor that they make.

    With `error` nothing was measured.
    """

    factor: float = 0.0
    alone: tuple[float, ...] = ()
    together: tuple[float, ...] = ()
    error: str = ""


def factor_of(runs: Sequence[Callable[[], object]], *, serial: bool, budget_s: float) -> Factor:
    """Run each alone, then all together, in turns; the medians count. With `serial` one of them runs at any moment."""
    alone_s = budget_s * (1 - SHARE_TOGETHER) / TURNS / len(runs)
    together_s = budget_s * SHARE_TOGETHER / TURNS
    alone, together = [], []
    for _ in range(TURNS):
        alone.append([_paces([run], serial=serial, for_s=alone_s)[0] for run in runs])
        together.append(_paces(runs, serial=serial, for_s=together_s))
    turns = zip(alone, together, strict=True)
    kept = [sum(now / before for before, now in zip(*turn, strict=True)) for turn in turns]
    before, beside = (tuple(map(statistics.median, zip(*one, strict=True))) for one in (alone, together))
    return Factor(statistics.median(kept), before, beside)


def _paces(runs: Sequence[Callable[[], object]], *, serial: bool, for_s: float) -> list[float]:
    """Batches a second of each, all at once, with what was under way at the end counted to its end."""
    turn = threading.Lock() if serial else contextlib.nullcontext()
    paces, errors = [0.0] * len(runs), list[BaseException]()
    begin = threading.Barrier(len(runs))

    def repeat(index: int) -> None:
        try:
            predictor.prepare_thread()
            begin.wait()
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < for_s or not done:
                with turn:
                    runs[index]()
                done += 1
            paces[index] = done / (time.perf_counter() - began)
        except BaseException as error:  # raised again below, in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(index,), daemon=True) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return paces


def measure(
    question: Question, device: devices.Device, budget_s: float, memory_limit: int | None, cache: Path
) -> Factor:
    """Load all members on the device, as a worker does, and find their factor. Raises WorkerError."""
    prepare(device, memory_limit)
    runs = []
    for shared in question.members:
        path = storage.fetch(shared.source, cache, storage.log_progress(shared.source.name))
        place = (path, shared.source, shared.inputs, shared.outputs, device, shared.batch_size, cache)
        runs.append(_batches(predictor.load(*place), shared))
    return factor_of(runs, serial=device.kind == "cpu", budget_s=budget_s)


def _batches(loaded: predictor.Predictor, shared: Shared) -> Callable[[], object]:
    # Alone and together have the same rows, so that what is in them makes no difference.
    rows = HostRows.cache(shared.inputs, shared.batch_size).zeros()
    return lambda: loaded.run(rows)


def main(argv: list[str]) -> int:
    """Measure and print; 0 with a result or an error of a model, 1 if the question was wrong."""
    try:
        options = _parser().parse_args(argv)
        die_with_parent(options.parent_pid)
        if options.nice:
            give_way()
        question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
        if len(question.members) < 2:
            raise ValueError("members: at least two share a device")
        device = device_of(options.device, options.cores, options.threads)
    except SystemExit as stop:
        return USAGE_EXIT if stop.code else 0
    except (OSError, ValueError, ContractError, msgspec.DecodeError, WorkerError) as error:
        sys.stderr.write(f"colocate: {error}\n")
        return USAGE_EXIT
    try:
        answer = measure(question, device, options.budget_s, options.memory_limit, options.cache_dir)
    except (WorkerError, RuntimeError, MemoryError) as error:
        answer = Factor(error=str(error) or type(error).__name__)
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ensemble_worker colocate", description=__doc__, allow_abbrev=False)
    add_device(parser)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all runs, once the models are loaded")
    parser.add_argument("--memory-limit", type=int, metavar="BYTES", help="what the members may take together")
    parser.add_argument("--cache-dir", type=Path, default=storage.default_cache_dir(), help="where models are kept")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    return parser
