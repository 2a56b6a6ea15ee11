"""The words that `v2`, `edge`, `routes` and `pipeline` share: what is asked, of which model, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]


class RequestError(Exception):
    """A request that gets an error answer: HTTP's `status`, and the message as V2's `{"error": …}`."""

    def __init__(self, status: int, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Model:
    """A model that clients can name: the ensemble (`member` is None) or one of its members (`<ensemble>.<member>`).

    `outputs` are what it answers by default. Under the rule `none` the ensemble's are `<member>.<output>`, member by
    member. `labels` has a tuple of class names for an output, where known.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: dict[str, tuple[str, ...]]
    member: int | None = None


@dataclass(frozen=True, slots=True)
class InputPart:
    """One input of a request: a range of the binary part of the body, or, when it came as JSON, an array.

    Either holds rows * row_bytes bytes, little-endian, C order.
    """

    start: int = 0
    stop: int = 0
    array: Array | None = None


@dataclass(frozen=True, slots=True)
class OutputWish:
    """One output that the answer shall have, binary or JSON, whole or as its `classes` best classes (0: whole)."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class InferHeader:
    """The JSON part of an infer request, checked against its model: everything but the binary tensors.

    Immutable, so that one parsed header serves every request that has the same bytes. `inputs` is in the model's order.
    `wishes` is empty when the client named no outputs: then all, in the model's order, as `binary_default` says.
    """

    model: Model
    rows: int
    inputs: tuple[InputPart, ...]
    wishes: tuple[OutputWish, ...] = ()
    binary_default: bool = False
    id: str = ""
    timeout_s: float | None = None
    quorum: int | None = None
    members: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets: outputs by name, of shape (rows, *shape), in the declared datatype (BF16 as uint16 bits).

    `used` and `missing` are names of members. With `members: true` in the request, `outputs` also holds
    `<member>.<output>` for every member used. Without such a wish `outputs` has the model's outputs only.
    """

    outputs: dict[str, Array]
    used: tuple[str, ...] = ()
    missing: tuple[str, ...] = field(default=())
