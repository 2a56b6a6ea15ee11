"""Who asked: what a request's answer is given to, once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ensemble_gateway.request import Answer, Array, InferHeader, RequestError


class Sink(Protocol):
    """Who asked: exactly one of the three is called, once, unless the request is cancelled."""

    header: InferHeader

    def answered(self, outputs: Sequence[Array]) -> None:
        """The usual answer: every member answered; the model's outputs in its order, valid during the call only."""

    def answered_in_full(self, answer: Answer) -> None:
        """An answer with members missing, or with each member's outputs."""

    def refused(self, error: RequestError) -> None:
        """No answer."""


class FutureSink:
    """A sink for callers that await."""

    def __init__(self, header: InferHeader, future: asyncio.Future[Answer]) -> None:
        self.header = header
        self.future = future

    def answered(self, outputs: Sequence[Array]) -> None:
        """Copy the outputs, which are valid for now only."""
        specs = self.header.model.outputs
        copies = {spec.name: np.array(output) for spec, output in zip(specs, outputs, strict=True)}
        self.answered_in_full(Answer(copies))

    def answered_in_full(self, answer: Answer) -> None:
        """Hand the answer over, unless nobody awaits it any more."""
        if not self.future.done():
            self.future.set_result(answer)

    def refused(self, error: RequestError) -> None:
        """Raise where the answer is awaited."""
        if not self.future.done():
            self.future.set_exception(error)
