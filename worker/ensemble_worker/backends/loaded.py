"""What a backend hands to the predictor: a call of the model as it was saved, and quicker ones that may agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ensemble_worker.signature import Signature

if TYPE_CHECKING:
    import torch

    from ensemble_worker.backends.stacking import Layers

# Takes the inputs in the model's order; gives a tensor, a sequence of tensors, or a dict of them.
Call = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Form:
    """A quicker execution of a model; `make` makes it, given a few rows, or as many as the model always takes."""

    name: str
    make: Callable[[Sequence[torch.Tensor]], Call]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, `name` says executed by what. `forms` are quicker executions of it, the most cautious first.

    `on_host`: its tensors are the host's even when it computes elsewhere. `layers`: what can be stacked with those of
    other models.
    """

    call: Call
    signature: Signature
    name: str = "eager"
    forms: tuple[Form, ...] = ()
    on_host: bool = False
    layers: Layers | None = None
