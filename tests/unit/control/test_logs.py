"""Log lines: one a record, with the ensemble that the task is about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from ensemble_operator.control.logs import current_ensemble, set_up


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield (stream := io.StringIO())
    root.handlers[:] = before
    root.setLevel(level)
    assert stream


async def test_each_task_logs_its_own_ensemble(stream: io.StringIO) -> None:
    set_up("json", "INFO", stream)
    log = logging.getLogger("test")

    async def work(name: str) -> None:
        current_ensemble.set(name)
        await asyncio.sleep(0)
        await asyncio.create_task(inner())

    async def inner() -> None:
        log.info("at %s", "work")

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for name in ("a/x", "b/y"):
            group.create_task(work(name))
    log.info("of nobody")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("ensemble") for line in lines] == ["a/x", "b/y", None]
    assert lines[0]["message"] == "at work"
    assert lines[0]["level"] == "info"


def test_a_traceback_stays_on_its_line(stream: io.StringIO) -> None:
    set_up("json", "INFO", stream)
    try:
        raise KeyError("é\nx")
    except KeyError:
        logging.getLogger("test").exception("broken")
    (line,) = stream.getvalue().splitlines()
    assert "KeyError" in json.loads(line)["error"]


def test_text_for_people(stream: io.StringIO) -> None:
    set_up("text", "WARNING", stream)
    current_ensemble.set("")
    logging.getLogger("test").info("unseen")
    logging.getLogger("test").warning("seen")
    assert stream.getvalue().endswith("warning seen\n")
    assert "unseen" not in stream.getvalue()
