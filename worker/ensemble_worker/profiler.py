"""`python -m ensemble_worker measure`: what one member costs on one device, measured alone in this fresh process.

Prints a JSON object a line as results come: how a download goes on, then the signature, the load and the weights, then
one for each batch size, in ascending order, for as long as a larger one may be worth its time; each is measured in
turns with the one before it. The model is loaded once. Memory is what the instance adds to an idle worker with torch,
and the process is capped, so that measuring never takes memory from what serves.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ensemble_contract.errors import ContractError
from ensemble_contract.orphan import die_with_parent
from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import FLOATING, TensorSpec, fp32_to_bf16
from ensemble_worker import predictor, signature, storage, timing
from ensemble_worker.chosen_forms import ChosenForms
from ensemble_worker.devices import Device
from ensemble_worker.errors import InvalidArchive, InvalidModel, ModelError, WorkerError
from ensemble_worker.measured_device import add_device, device_of, give_way, numbers_of
from ensemble_worker.meter import Meter, prepare
from ensemble_worker.signature import Signature

# A larger batch that is not quick to measure is tried only while the last one brought so much more.
WORTHWHILE_GAIN = 1.02
PROGRESS_PERIOD_S = 0.25
SEED = 3
USAGE_EXIT = 1


Say = Callable[[dict[str, Any]], None]


class Subject(msgspec.Struct, frozen=True, rename="camel"):
    """What is measured; inputs and outputs may be missing where the model file tells them."""

    member: ModelSource
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """One batch size. `latency_s` is the median; `spread` is 10th to 90th percentile over it."""

    batch_size: int
    rows_per_s: float
    latency_s: float
    spread: float
    memory_bytes: int
    form: str

    def as_json(self) -> dict[str, Any]:
        """The line that `measure` prints."""
        return {
            "batchSize": self.batch_size,
            "rowsPerS": round(self.rows_per_s, 3),
            "latencyS": round(self.latency_s, 9),
            "spread": round(self.spread, 4),
            "memoryBytes": self.memory_bytes,
            "form": self.form,
        }


def main(argv: list[str]) -> int:
    """Measure and print; 0 if there are results, among them errors of the model, 1 if the question was wrong."""
    try:
        options = _parser().parse_args(argv)
        die_with_parent(options.parent_pid)
        if options.nice:
            give_way()
        subject = _read_subject(options.spec)
        device = device_of(options.device, options.cores, options.threads)
    except SystemExit as stop:
        return USAGE_EXIT if stop.code else 0
    except (OSError, ContractError, msgspec.DecodeError, WorkerError) as error:
        sys.stderr.write(f"measure: {error}\n")
        return USAGE_EXIT
    try:
        budget = Budget(options.budget_s, options.load_included)
        measure(
            subject, device, options.sizes, options.known, budget, options.memory_limit, options.cache_dir, _print_line
        )
    except ModelError as error:
        _print_line({"error": str(error), "kind": error.kind})
    return 0


def _print_line(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class Known(NamedTuple):
    """A batch size that was measured before, and the seconds that a batch of it takes."""

    batch_size: int
    latency_s: float


class Budget(NamedTuple):
    """Seconds for the batches, and whether loading the model (once it is on disk) is part of them."""

    seconds: float
    load_included: bool


def measure(
    subject: Subject,
    device: Device,
    sizes: Sequence[int],
    known: Known | None,
    budget: Budget,
    memory_limit: int | None,
    cache_dir: Path,
    say: Say,
) -> None:
    """Say the lines that `measure` prints. The first batch size is measured even if the budget is spent by then.

    It is measured in turns with what is `known`, where something is.

    Changes this process: its number of threads and its limit of memory. Raises ModelError if the member cannot be
    loaded, or does not run at its smallest batch size.
    """
    meter = prepare(device, memory_limit)
    path = storage.fetch(subject.member, cache_dir, _saying_progress(say))
    told = _told(path, subject.member)
    inputs, outputs = _tensors(subject, told)
    ascending = sorted(set(sizes)) if told.fixed_batch is None else [told.fixed_batch]
    predictor.rehearse(subject.member.format)
    meter.restart()
    before = time.monotonic()
    model = predictor.read(path, subject.member, inputs, outputs, device, ascending[0])
    loaded = model.at(ascending[0])
    say(_first_line(told, device, time.monotonic() - before, meter))
    ChosenForms(cache_dir).keep(subject.member, device, model.form)
    deadline = (before if budget.load_included else time.monotonic()) + budget.seconds
    batch, before_it = _Batch(loaded, inputs, ascending[0]), None
    if known is not None and known.batch_size < ascending[0]:
        before_it = _Batch(model.at(known.batch_size), inputs, known.batch_size), known.latency_s
    found = [_measure_size(batch, before_it, meter)]
    say(found[0].as_json())
    for size in ascending[1:]:
        if not _is_worthwhile(found, size, deadline - time.monotonic()):
            return
        before_it = batch, found[-1].latency_s
        try:
            batch = _Batch(model.at(size), inputs, size)
            found.append(_measure_size(batch, before_it, meter))
        except ModelError as error:
            say({"error": str(error), "kind": error.kind, "batchSize": size})
            return
        say(found[-1].as_json())


def _is_worthwhile(found: Sequence[Measurement], size: int, left_s: float) -> bool:
    """Whether to measure a larger batch: quick ones while there is time, others while larger ones bring more.

    Its time is that of the last one, row for row, for a warm-up and the fewest turns of both.
    """
    last = found[-1]
    expected_s = (1 + timing.MIN_RUNS) * size / last.rows_per_s + timing.MIN_RUNS * last.latency_s
    if expected_s > left_s:
        return False
    best_before = max((one.rows_per_s for one in found[:-1]), default=0.0)
    return expected_s < timing.SIZE_S or last.rows_per_s > WORTHWHILE_GAIN * best_before


def _saying_progress(say: Say) -> storage.Progress:
    """Lines of how a download goes on, a few a second."""

    def report(done: int, total: int | None) -> None:
        say({"downloadedBytes": done, "totalBytes": total})

    return storage.at_most_every(PROGRESS_PERIOD_S, report)


def _first_line(told: Signature, device: Device, load_s: float, meter: Meter) -> dict[str, Any]:
    return {
        "signature": told.as_json(),
        "loadS": round(load_s, 4),
        "memoryBytes": meter.added(),
        "loadPeakBytes": meter.peak_added(),
        "overheadBytes": meter.idle_bytes,
        "deviceClass": device.device_class,
    }


class _Batch:
    """So many rows, and the predictor for them."""

    def __init__(self, loaded: predictor.Predictor, inputs: tuple[TensorSpec, ...], size: int) -> None:
        self.size, self.form = size, loaded.form
        self._loaded, self._rows = loaded, _rows(inputs, size)

    def run(self) -> object:
        return self._loaded.run(self._rows)


def _measure_size(batch: _Batch, before_it: tuple[_Batch, float] | None, meter: Meter) -> Measurement:
    """The measurement of a batch, in turns with the one before it, of which the seconds are known."""
    meter.reset_peak()
    if before_it is None:
        latency_s, spread = timing.alone(batch.run)
    else:
        known, known_s = before_it
        latency_s, spread = timing.in_turns(batch.run, known.run, known_s)
    return Measurement(batch.size, batch.size / latency_s, latency_s, spread, meter.peak_added(), batch.form)


def _rows(inputs: tuple[TensorSpec, ...], size: int) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """Random bits of small numbers: zeros would flatter processors that skip them."""
    generator = np.random.default_rng(SEED)
    made = []
    for spec in inputs:
        shape = (size, *spec.shape)
        if spec.datatype == "BF16":
            made.append(fp32_to_bf16(generator.standard_normal(shape, dtype=np.float32)))
        elif spec.datatype in FLOATING:
            made.append(generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype))
        else:
            made.append(generator.integers(0, 2, shape).astype(spec.dtype))
    return made


def _told(path: Path, member: ModelSource) -> Signature:
    try:
        return signature.of(path, member.format)
    except (InvalidArchive, InvalidModel) as error:
        raise ModelError(member.name, member.uri, str(error)) from error


def _tensors(subject: Subject, told: Signature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What is declared, else what the model tells.

    Raises ModelError if neither says it.
    """
    inputs, outputs = subject.inputs or told.inputs, subject.outputs or told.outputs
    for field, tensors in (("input", inputs), ("output", outputs)):
        if not tensors:
            cause = f"the file does not tell its {field}s: declare them in spec.{field}"
            raise ModelError(subject.member.name, subject.member.uri, cause)
    return tuple(inputs or ()), tuple(outputs or ())


def _read_subject(spec: str) -> Subject:
    text = sys.stdin.buffer.read() if spec == "-" else Path(spec).read_bytes()
    return msgspec.json.decode(text, type=Subject)


def _sizes(text: str) -> list[int]:
    sizes = numbers_of(text)
    if 0 in sizes:
        raise ValueError(text)
    return sizes


def _known(text: str) -> Known:
    rows, _, seconds = text.partition(":")
    try:
        known = Known(int(rows), float(seconds))
        if known.batch_size >= 1 and 0 < known.latency_s < math.inf:
            return known
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not ROWS:SECONDS, both above 0, such as 8:0.012")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ensemble_worker measure", description=__doc__, allow_abbrev=False)
    add_device(parser)
    parser.add_argument(
        "--spec", required=True, metavar="FILE|-", help='JSON: {"member": ..., "inputs": ..., "outputs": ...}'
    )
    parser.add_argument("--sizes", type=_sizes, default=[1], metavar="N,N", help="batch sizes in rows")
    parser.add_argument(
        "--known",
        type=_known,
        metavar="ROWS:SECONDS",
        help="a batch size that was measured before: the first is measured in turns with it, and compared",
    )
    parser.add_argument(
        "--budget-s", type=float, default=30.0, help="for all batch sizes together, once the model is loaded"
    )
    parser.add_argument("--load-included", action="store_true", help="the budget is for loading the model, too")
    parser.add_argument(
        "--memory-limit", type=int, metavar="BYTES", help="what measuring may take (default: 80 %% of what is free)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=storage.default_cache_dir(), help="where remote models are kept"
    )
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is gone")
    return parser
