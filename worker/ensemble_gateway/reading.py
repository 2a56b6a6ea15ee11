"""Where a connection is with its client's bytes, and what it remembers of the last inference."""

from __future__ import annotations

import enum
from typing import NamedTuple

from ensemble_gateway.heads import Head
from ensemble_gateway.pipeline import Pipeline
from ensemble_gateway.request import InferHeader

# Heads with JSON up to this size are remembered by their connection.
SEEN_BYTES = 4096


class Reading(enum.Enum):
    """Where a connection is."""

    HEAD = enum.auto()  # a request's head is awaited
    BODY = enum.auto()  # an inference's body is awaited
    ANSWERING = enum.auto()  # a request is being answered; what comes is kept for later
    LENDING = enum.auto()  # aiohttp is given the body of its request
    LENT = enum.auto()  # aiohttp has the connection for good
    LEAVING = enum.auto()  # an error was answered; what comes is dropped


class Seen(NamedTuple):
    """A connection's last inference: the bytes before its rows, and what they mean under a pipeline.

    Most clients send the same head and JSON again and again, with other rows: then nothing is left to parse.
    """

    text: bytes
    head: Head
    header: InferHeader
    pipeline: Pipeline
