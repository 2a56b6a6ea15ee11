"""Quicker executions of a TorchScript module, and the choice of one: the fastest that agrees with the model as saved.

Freezing folds batch norms into convolutions; torch.jit.optimize_for_inference also fuses and lays out weights for
oneDNN. A backend may know others. Which of them wins depends on model, batch and processor, so it is timed.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ensemble_worker.backends.loaded import Call, Form

log = logging.getLogger(__name__)

# Largest difference from eager, relative to the largest value: rounding of fused operators, never a different function.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GAIN_TO_SWITCH = 0.97
MIN_ROUNDS, MAX_ROUNDS = 2, 300
TIMED_S = 0.03
EAGER = "eager"

Script = Callable[[], torch.jit.ScriptModule]


def compiled(script: Script, device: torch.device) -> tuple[Form, ...]:
    """A module frozen, and on CPUs also fused and laid out for oneDNN. `script` makes the module, once.

    Both work on clones of it.
    """
    module = functools.cache(script)
    frozen = Form("frozen", lambda _: torch.jit.freeze(module()))
    if device.type != "cpu":
        return (frozen,)
    return frozen, Form("fused", lambda _: torch.jit.optimize_for_inference(module()))


def choose(
    eager: Call,
    forms: Sequence[Form],
    trials: Sequence[Sequence[torch.Tensor]],
    outputs_of: Callable[[Any], Sequence[torch.Tensor]],
    timed: int,
    preferred: str = "",
) -> tuple[str, Call]:
    """The name and call of the fastest form that agrees with `eager` on all trials; the first `timed` are timed.

    The last one is of a few rows, with which forms are made.

    `preferred` names the form that won before: it is taken untimed if it still agrees. A form that cannot be made or
    differs is passed over with a line in the log. At most three are in memory at a time.
    """
    if preferred == EAGER:
        return EAGER, eager
    expected = [outputs_of(eager(*trial)) for trial in trials]
    name, best = EAGER, eager
    for form in sorted(forms, key=lambda form: form.name != preferred):
        difference, faster = "", False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = form.make(trials[-1])
                difference = _difference(call, trials[:timed], expected[:timed], outputs_of)
                faster = not difference and (form.name == preferred or _is_faster(call, best, trials[:timed]))
                if faster:  # only then is the rest of the trials worth its time
                    difference = _difference(call, trials[timed:], expected[timed:], outputs_of)
        except Exception as error:  # compilers raise nearly anything, and eager is always right.
            difference = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        if difference:
            log.info("the form %s is not used: %s", form.name, difference)
        elif faster:
            name, best = form.name, call
            if form.name == preferred:
                break
    return name, best


def _difference(
    call: Call,
    trials: Sequence[Sequence[torch.Tensor]],
    expected: Sequence[Sequence[torch.Tensor]],
    outputs_of: Callable[[Any], Sequence[torch.Tensor]],
) -> str:
    """How a form differs from eager, empty if it does not. Twice each: TorchScript optimises after its first runs."""
    for trial, wanted in [*zip(trials, expected, strict=True)] * 2:
        got = outputs_of(call(*trial))
        if len(got) != len(wanted):
            return f"{len(got)} outputs instead of {len(wanted)}"
        for a, b in zip(got, wanted, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"gives {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
            tolerance = TOLERANCES.get(b.dtype, 0.0)
            finite = b[b.isfinite()] if b.is_floating_point() else b[:0]
            scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True):
                return f"differs from eager by more than {tolerance * scale:.1e}"
    return ""


def _is_faster(new: Call, old: Call, trials: Sequence[Sequence[torch.Tensor]]) -> bool:
    """By the geometric mean over the timed trials, in turns, so that a busy machine is as unfair to both.

    The new one must win clearly, for the old one is simpler.
    """
    gain = 1.0
    for trial in trials:
        best = {new: math.inf, old: math.inf}
        deadline = time.perf_counter() + TIMED_S
        for round_number in range(MAX_ROUNDS):
            if round_number >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for call in best:
                best[call] = min(best[call], _seconds(call, trial))
        log.debug("%d rows: %.3f ms, so far %.3f ms", len(trial[0]), 1e3 * best[new], 1e3 * best[old])
        gain *= best[new] / best[old]
    return bool(gain ** (1 / len(trials)) < GAIN_TO_SWITCH)


def _seconds(call: Call, trial: Sequence[torch.Tensor]) -> float:
    started = time.perf_counter()
    call(*trial)
    if trial[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
