"""The choice among executions of a model: the fastest that agrees, or the one that is known to be, if it agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from ensemble_worker.backends import forms
from ensemble_worker.backends.loaded import Form

TRIALS = [[torch.ones(4, 3)], [torch.ones(1, 3)], [torch.ones(3, 3)]]


def _double(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.003)
    return x * 2


def _quick(x: torch.Tensor) -> torch.Tensor:
    return x + x


def _slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.006)
    return x * 2


def _wrong(x: torch.Tensor) -> torch.Tensor:
    return x * 2.001


def _wrong_for_three(x: torch.Tensor) -> torch.Tensor:
    return x * (3 if len(x) == 3 else 2)


def _fixed(x: torch.Tensor) -> torch.Tensor:
    return (x * 2)[:1]


def _failing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not for me")


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick": _quick, "slow": _slow, "wrong": _wrong, "wrong for three": _wrong_for_three, "fixed": _fixed,
    "failing": _failing,
}  # fmt: skip


def _choose(names: list[str], preferred: str = "") -> tuple[str, list[str]]:
    made: list[str] = []

    def maker(name: str) -> Callable[[Sequence[torch.Tensor]], Callable[[torch.Tensor], torch.Tensor]]:
        def make(rows: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            assert rows is TRIALS[-1]
            made.append(name)
            return CALLS[name]

        return make

    candidates = [Form(name, maker(name)) for name in names]
    return forms.choose(_double, candidates, TRIALS, lambda y: (y,), 2, preferred)[0], made


@pytest.mark.parametrize("name", ["slow", "wrong", "wrong for three", "fixed", "failing"])
def test_what_is_slower_or_differs_is_passed_over(name: str) -> None:
    assert _choose([name])[0] == "eager"
    assert _choose([name, "quick"])[0] == "quick"
    assert _choose(["quick", name])[0] == "quick"


def test_the_preferred_form_is_made_alone() -> None:
    assert _choose(["slow", "quick"], "quick") == ("quick", ["quick"])
    assert _choose(["quick", "slow"], "slow") == ("slow", ["slow"])
    assert _choose(["quick"], "eager") == ("eager", [])


def test_a_preferred_form_that_does_not_agree_any_more_is_not_taken() -> None:
    assert _choose(["wrong for three", "quick"], "wrong for three") == ("quick", ["wrong for three", "quick"])
    assert _choose(["quick"], "of another version") == ("quick", ["quick"])
