"""Child processes of a benchmark that answer one JSON line for each JSON line asked, and never outlive it."""

from __future__ import annotations

import contextlib
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ensemble_contract.orphan import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 5.0
ROOT = Path(__file__).parent.parent

AnswerT = TypeVar("AnswerT")
QuestionT = TypeVar("QuestionT")


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as an exit does: what it has started is stopped first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class ChildFailed(Exception):
    """A child process ended, was silent for too long, or said that it cannot go on; the message has its last words."""


class Refusal(msgspec.Struct, frozen=True):
    """A child's answer when it cannot do what it was asked."""

    error: str


class Child:
    """A process that answers each JSON line on its stdin with one on its stdout; its stderr goes to `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, pass_fds: Sequence[int] = ()) -> None:
        self._log = log
        self._module = module
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=tuple(pass_fds),
                cwd=ROOT,
            )
        self._waiting = b""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, question: msgspec.Struct | None) -> None:
        """Send a line.

        Raises ChildFailed if the process is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(question) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed(f"cannot be reached ({error})") from error

    def hear(self, form: type[AnswerT], timeout_s: float) -> AnswerT:
        """The next line that the process prints.

        Raises ChildFailed when it ended, when `timeout_s` passed, or when the line is a Refusal.
        """
        line = self._line(time.monotonic() + timeout_s)
        try:
            return msgspec.json.decode(line, type=form)
        except msgspec.ValidationError:
            refusal = msgspec.json.decode(line, type=Refusal)
            raise self._failed(refusal.error) from None

    def ask(self, question: msgspec.Struct | None, form: type[AnswerT], timeout_s: float) -> AnswerT:
        """Send a line and await its answer."""
        self.tell(question)
        return self.hear(form, timeout_s)

    def stop(self) -> None:
        """End the process: by closing its stdin, then by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._waiting:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failed("did not answer in time")
                chunk = self._process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
                if not chunk:
                    raise self._failed(f"ended with exit code {self._process.wait()}")
                self._waiting += chunk
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line

    def _failed(self, what: str) -> ChildFailed:
        return ChildFailed(f"{self._module} (pid {self.pid}) {what}; {last_words(self._log)}")


def last_words(log: Path, lines: int = 8) -> str:
    """The end of a process's log, for the message that says why it failed."""
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f"{log} ends with:\n" + "\n".join(text.splitlines()[-lines:]) if text else f"{log} is empty"


def answer_lines(form: type[QuestionT], answer: Callable[[QuestionT], Any], parent_pid: int) -> None:
    """The child's side: answer every line of stdin until it closes. What goes wrong is answered as a Refusal."""
    die_with_parent(parent_pid)
    for line in sys.stdin.buffer:
        try:
            reply = answer(msgspec.json.decode(line, type=form))
        except Exception as error:
            reply = Refusal(f"{type(error).__name__}: {error}")
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()
