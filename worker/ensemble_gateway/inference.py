"""The inference of a connection: from a request's bytes to a request in flight, and from its answer to the reply.

One at a time. JSON that is large, asked or answered, is read and written in a thread: others shall not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ensemble_gateway.heads import Head
from ensemble_gateway.offloop import OFF_LOOP_BYTES, is_large
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.queues import Request
from ensemble_gateway.reading import SEEN_BYTES, Seen
from ensemble_gateway.replies import error_reply, full_reply
from ensemble_gateway.request import Answer, Array, InferHeader, RequestError

if TYPE_CHECKING:
    from ensemble_gateway.edge import Edge

_LOG = logging.getLogger(__name__)


class Inference:
    """Takes inferences, and is the sink of the one in flight; a connection completes it."""

    __slots__ = ("_due", "_edge", "_head", "_large", "_pipeline", "_request", "_seen", "header")

    header: InferHeader

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._head: Head | None = None
        self._request: Request | None = None
        self._pipeline: Pipeline | None = None
        self._seen: Seen | None = None
        self._large: asyncio.Task[None] | None = None
        # When the client must have done its next thing.
        self._due = math.inf

    @abstractmethod
    def _write(self, reply: bytes) -> None:
        """Write the reply; the request is answered then."""

    @abstractmethod
    def _keep_alive(self) -> bool:
        """Whether the client may send more."""

    def _infer(self, head: Head, request: memoryview) -> None:
        """Take an inference, head and body."""
        edge = self._edge
        try:
            pipeline = edge.pipeline()
            text, binary = head.split(request[head.length :])
            if len(text) > OFF_LOOP_BYTES:
                self._due = math.inf
                self._large = asyncio.create_task(self._infer_large(head, text, binary))
                return
            header = edge.header_of(pipeline, head, text, len(binary))
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()
        else:
            self._submit(pipeline, header, binary)
            if any(part.array is not None for part in header.inputs):
                # The rows are in the store now: twice would be once too often.
                self.header = replace(header, inputs=())
            elif head.length + len(text) <= SEEN_BYTES:
                self._seen = Seen(bytes(request[: head.length + len(text)]), head, header, pipeline)
        edge.budget.release(self)

    async def _infer_large(self, head: Head, text: bytes, binary: memoryview) -> None:
        try:
            header, pipeline = await self._edge.parse_off_loop(head, text, binary)
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()
        else:
            self._submit(pipeline, header, binary)
            self.header = replace(header, inputs=())
        self._edge.budget.release(self)

    def _submit(self, pipeline: Pipeline, header: InferHeader, binary: memoryview) -> None:
        self.header, self._pipeline = header, pipeline
        try:
            self._request = pipeline.submit(self, binary)
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()

    def _leave_inference(self) -> None:
        """The client has left: rows in flight are dropped."""
        if self._request is not None and self._pipeline is not None:
            self._pipeline.cancel(self._request)
        if self._large is not None:
            self._large.cancel()
        self._edge.budget.release(self)
        self._request = self._large = None

    # -- Sink -----------------------------------------------------------------------------------------------------

    def answered(self, outputs: Sequence[Array]) -> None:
        """Write the usual answer: a prefix known from the header, and the outputs' bytes."""
        prefix = self._edge.replies.prefix(self.header, self._keep_alive())
        if prefix is None:
            specs = self.header.model.outputs
            self.answered_in_full(Answer({s.name: o for s, o in zip(specs, outputs, strict=True)}))
        else:
            self._write(prefix.join_with(outputs))

    def answered_in_full(self, answer: Answer) -> None:
        """Write any other answer."""
        if is_large(self.header, answer):
            # Outputs are valid during this call only.
            kept = replace(answer, outputs={name: np.array(output) for name, output in answer.outputs.items()})
            self._large = asyncio.create_task(self._write_large(self.header, kept))
            return
        try:
            self._write(full_reply(self.header, answer, self._keep_alive()))
        except RequestError as error:
            self.refused(error)

    async def _write_large(self, header: InferHeader, answer: Answer) -> None:
        try:
            self._write(await asyncio.to_thread(full_reply, header, answer, self._keep_alive()))
        except RequestError as error:
            self.refused(error)
        except Exception:
            self._refuse_unexpected()

    def refused(self, error: RequestError) -> None:
        """Write an error."""
        self._write(error_reply(error, self._keep_alive()))

    def _refuse_unexpected(self) -> None:
        _LOG.exception("an inference could not be taken")
        self.refused(RequestError(500, "internal error: the gateway's log has the cause"))

    @abstractmethod
    def resume_body(self) -> None:
        """The large body that waits to be read may come now."""
