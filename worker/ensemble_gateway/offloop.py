"""Work that would hold the event loop up for long is done in a thread: JSON of many numbers, compression."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ensemble_gateway.request import Answer, InferHeader

# JSON takes about 10 ns a byte: below, a thread costs more than it saves the others.
OFF_LOOP_BYTES = 64 << 10
# Numbers of an answer in JSON, which take about 100 ns each.
OFF_LOOP_ELEMENTS = 8192

P = ParamSpec("P")
T = TypeVar("T")


async def off_loop_if(large: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a pure function, in a thread if what it is given is large."""
    if large:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


def is_large(header: InferHeader, answer: Answer) -> bool:
    """Whether an answer has so many numbers, and not only in binary form, that writing it takes long."""
    elements = sum(output.size for output in answer.outputs.values())
    if elements <= OFF_LOOP_ELEMENTS:
        return False
    return (
        any(not wish.binary or wish.classes for wish in header.wishes) if header.wishes else not header.binary_default
    )
