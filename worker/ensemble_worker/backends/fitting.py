"""A loaded model fitted to what its ensemble declares: tensors in order, types compared, its execution chosen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ensemble_contract.tensors import TensorSpec
from ensemble_worker.backends import forms
from ensemble_worker.backends.loaded import Call, Loaded
from ensemble_worker.backends.stacking import Layers
from ensemble_worker.backends.tensors import DTYPES, Array, describe, host_array, shares_memory, trial_inputs, unpacker
from ensemble_worker.errors import InvalidModel

log = logging.getLogger(__name__)

SEED = 11
FEW_ROWS = 3
# Of the longer batch on which forms are timed: as many rows as take about so long, up to so many.
TIMED_TRIAL_S = 0.02
TIMED_ROWS = 64

Unpack = Callable[[Any], Sequence[torch.Tensor]]
Rows = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model ready to be called.

    Its input i is the declared input `input_order[i]`; the declared output j is its output `output_order[j]`.
    `modifies_inputs`: it writes into its inputs, so it must get copies. `shares_inputs`: an output may lie in an input.
    `trial` holds a few random rows, in the model's order, on the host. `max_batch` is the most that the model takes, if
    it says so. `layers`: what can be stacked with those of other models.
    """

    call: Call
    form: str
    unpack: Unpack
    input_order: tuple[int, ...]
    output_order: tuple[int, ...]
    fixed_batch: int | None
    max_batch: int | None
    modifies_inputs: bool
    shares_inputs: bool
    on_host: bool
    trial: tuple[torch.Tensor, ...]
    layers: Layers | None

    def rows(self, count: int) -> list[torch.Tensor]:
        """So many rows like those of `trial`."""
        return _resized(self.trial, count)

    def arrays(self, count: int) -> list[Array]:
        """The same as an array for each declared input."""
        tensors = dict(zip(self.input_order, self.rows(count), strict=True))
        return [host_array(tensors[i]) for i in range(len(tensors))]


def fit(
    loaded: Loaded,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    device: torch.device,
    batch_size: int,
    preferred_form: str = "",
) -> Fitted:
    """Run the model on a few random rows, compare its outputs with the declared ones, and choose its quickest form.

    Where the file does not say that it takes any number of rows, it must take `batch_size`. Raises InvalidModel naming
    the input or output that differs, or the batch size that the model does not take.
    """
    told = loaded.signature
    check_batch(told.fixed_batch, told.max_batch, batch_size)
    input_order = match("input", inputs, told.inputs)
    output_order = match("output", outputs, told.outputs)
    ordered = [inputs[i] for i in input_order]
    few = min(FEW_ROWS, told.max_batch or FEW_ROWS)
    rows = told.fixed_batch or (few if told.dynamic_batch else batch_size)
    trial, given, result = _first_run(loaded.call, ordered, rows, device)
    unpack = unpacker(result, [output.name for output in outputs])
    results = unpack(result)
    modifies = not all(torch.equal(a, b) for a, b in zip(given, trial, strict=True))
    shares = any(shares_memory(y, x) for y in results for x in given)
    check_outputs(results, outputs, output_order, rows)
    fixed = told.fixed_batch
    others = [other for other in (1, few) if other != rows]
    if fixed is None and not _takes_other_rows(loaded.call, unpack, trial, outputs, output_order, others):
        if told.dynamic_batch:
            raise InvalidModel(f"takes {rows} rows but not {others}: its batch is not dynamic, as its file says it is")
        fixed = rows
        log.info("it takes batches of exactly %d rows: smaller ones are padded", rows)
    name, call = loaded.name, loaded.call
    if loaded.forms and not modifies:
        trials = [trial] if fixed else _trials(loaded.call, trial, told.max_batch or TIMED_ROWS, few)
        timed = max(1, len(trials) - 1)
        name, call = forms.choose(loaded.call, loaded.forms, trials, unpack, timed, preferred_form)
    host = tuple(t.cpu() for t in trial)
    layers = None if fixed or modifies or shares else loaded.layers
    limits = fixed, told.max_batch
    return Fitted(
        call, name, unpack, input_order, output_order, *limits, modifies, shares, loaded.on_host, host, layers
    )


def check_batch(fixed_batch: int | None, max_batch: int | None, batch_size: int) -> None:
    """Raises InvalidModel if a model does not take `batch_size` rows, or as many filled up to its fixed batch."""
    if fixed_batch is not None and batch_size > fixed_batch:
        raise InvalidModel(f"was exported for batches of {fixed_batch} rows: {batch_size} are too many")
    if max_batch is not None and batch_size > max_batch:
        raise InvalidModel(f"was exported for batches of up to {max_batch} rows: {batch_size} are too many")


def match(kind: str, declared: Sequence[TensorSpec], told: Sequence[TensorSpec] | None) -> tuple[int, ...]:
    """For inputs: the declared index of each of the model's; for outputs: the model's index of each declared one.

    By name if both sides have the same names, else by position. Raises InvalidModel if number, datatype or shape
    differ.
    """
    if told is None:
        return tuple(range(len(declared)))
    if len(told) != len(declared):
        raise InvalidModel(
            f"has {len(told)} {kind}s ({_names(told)}), declared are {len(declared)} ({_names(declared)})"
        )
    names = [t.name for t in told]
    by_name = {d.name for d in declared} == set(names)
    places = [names.index(d.name) if by_name else i for i, d in enumerate(declared)]
    for spec, place in zip(declared, places, strict=True):
        if (spec.datatype, spec.shape) != (told[place].datatype, told[place].shape):
            theirs = describe(DTYPES[told[place].datatype], told[place].shape)
            raise InvalidModel(
                f"{kind} {spec.name!r}: declared {spec.datatype} {list(spec.shape)}, the model has {theirs} a row"
            )
    return tuple(places) if kind == "output" else tuple(places.index(i) for i in range(len(places)))


def check_outputs(
    results: Sequence[torch.Tensor], outputs: Sequence[TensorSpec], order: Sequence[int], rows: int
) -> None:
    """Raises InvalidModel naming the first output whose number of rows, datatype or shape is not as declared."""
    if len(results) != len(outputs):
        raise InvalidModel(f"gives {len(results)} outputs, declared are {len(outputs)} ({_names(outputs)})")
    for spec, place in zip(outputs, order, strict=True):
        got = results[place]
        if got.dtype != DTYPES[spec.datatype] or tuple(got.shape) != (rows, *spec.shape):
            wanted, given = describe(DTYPES[spec.datatype], (rows, *spec.shape)), describe(got.dtype, got.shape)
            raise InvalidModel(f"output {spec.name!r}: declared {wanted} for {rows} rows, the model gives {given}")


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _first_run(call: Call, specs: Sequence[TensorSpec], rows: int, device: torch.device) -> tuple[Rows, Rows, Any]:
    """Rows that the model takes, the copies it was given, and what it gave; of 0 and 1, if others leave tables."""
    try:
        return _run(call, [t.to(device) for t in trial_inputs(specs, rows, SEED, small=False)])
    except IndexError:
        return _run(call, [t.to(device) for t in trial_inputs(specs, rows, SEED, small=True)])


def _run(call: Call, trial: Rows) -> tuple[Rows, Rows, Any]:
    given = [t.clone() for t in trial]
    return trial, given, call(*given)


def _takes_other_rows(
    call: Call,
    unpack: Unpack,
    trial: Rows,
    outputs: Sequence[TensorSpec],
    order: Sequence[int],
    others: Sequence[int],
) -> bool:
    for rows in others:
        try:
            check_outputs(unpack(call(*_resized(trial, rows))), outputs, order, rows)
        except (InvalidModel, RuntimeError, IndexError):
            return False
    return True


def _trials(call: Call, trial: Rows, most_rows: int, few: int) -> list[Rows]:
    """The batches to time (as many rows as take about 20 ms, whatever batch is planned, and one row), then another."""
    one = _resized(trial, 1)
    call(*one)
    started = time.perf_counter()
    call(*one)
    rows = max(1, min(most_rows, TIMED_ROWS, round(TIMED_TRIAL_S / (time.perf_counter() - started))))
    return [*(_resized(trial, n) for n in dict.fromkeys((rows, 1))), _resized(trial, few)]


def _resized(trial: Sequence[torch.Tensor], rows: int) -> Rows:
    """Copies of the first rows, repeated if there are fewer."""
    return [t.repeat(-(-rows // len(t)), *[1] * (t.dim() - 1))[:rows].contiguous() for t in trial]
