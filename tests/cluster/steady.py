"""Runs in a pod: asks an ensemble without a pause and prints, twice a second, what became of all requests so far.

`steady.py HOST NAME ASKERS`: so many ask at once. Each request has a connection of its own; one that cannot be made is
tried once more. A line is {"sent", "answered", "unconnected", "lost", "failed", "wrong", "factors", "statuses", "last",
"calm_s", "slowest_s", "errors"}: `unconnected` were never sent, `lost` were sent and had no answer, `failed` had a
status other than 200, `wrong` are no multiple of the question; `factors` counts the answers by how many times the
question they are, `statuses` the failures by their status; `last` is the newest answer of each of the askers, `calm_s`
the time since the latest request without a right answer began, `slowest_s` the longest from a connection to its answer.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import threading
import time
from collections import Counter

PAUSE_S = 0.05
CONNECT_S = 2.0
ANSWER_S = 20.0
WIDTH = 4
# Each connection has the next port of these, so that none comes again while a node's connection tracking remembers a
# SYN that nobody answered (120 s): a SYN from the same port would follow it to the same dead pod, whatever the Service
# says by then. Ports that the kernel chooses do come again, for it begins elsewhere every 10 s.
PORTS = itertools.cycle(range(32768, 61000))


class Tally:
    """What became of the requests; its methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._factors: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._last: dict[int, str] = {}
        self._harmed_at = time.monotonic()
        self._slowest_s = 0.0
        self._errors: list[str] = []

    def sent(self) -> None:
        with self._lock:
            self._outcomes["sent"] += 1

    def harmed(self, outcome: str, began: float, error: str) -> None:
        with self._lock:
            self._outcomes[outcome] += 1
            self._harmed_at = max(self._harmed_at, began)
            self._errors = [*self._errors[-9:], f"{time.strftime('%X')} {outcome}: {error}"]

    def heard(self, status: int, took_s: float) -> None:
        with self._lock:
            self._slowest_s = max(self._slowest_s, took_s)
            if status != 200:
                self._statuses[status] += 1

    def answered(self, asker: int, factor: str) -> None:
        with self._lock:
            self._outcomes["answered"] += 1
            self._factors[factor] += 1
            self._last[asker] = factor

    def line(self) -> str:
        with self._lock:
            names = ("sent", "answered", "unconnected", "lost", "failed", "wrong")
            found: dict[str, object] = {name: self._outcomes[name] for name in names}
            found |= {"factors": self._factors, "statuses": self._statuses, "last": sorted(set(self._last.values()))}
            found |= {"calm_s": time.monotonic() - self._harmed_at, "slowest_s": self._slowest_s}
            return json.dumps({**found, "errors": self._errors})


def connected(host: str) -> http.client.HTTPConnection:
    """A connection, at the second attempt at the latest; raises OSError."""
    for attempt in (1, 2):
        connection = http.client.HTTPConnection(host, 8000, timeout=CONNECT_S, source_address=("", next(PORTS)))
        try:
            connection.connect()
            return connection
        except OSError:
            if attempt == 2:
                raise
    raise AssertionError


def ask(host: str, name: str, asker: int, tally: Tally) -> None:
    """One request and its place in the tally."""
    question = [float(random.randint(1, 1000)) for _ in range(WIDTH)]
    tensor = {"name": "numbers", "datatype": "FP32", "shape": [1, WIDTH], "data": question}
    body = json.dumps({"inputs": [tensor]}).encode()
    began = time.monotonic()
    tally.sent()
    try:
        connection = connected(host)
    except OSError as error:
        return tally.harmed("unconnected", began, repr(error))
    sent = time.monotonic()
    try:
        connection.sock.settimeout(ANSWER_S)
        connection.request("POST", f"/v2/models/{name}/infer", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        return tally.harmed("lost", began, repr(error))
    finally:
        connection.close()
    tally.heard(response.status, time.monotonic() - sent)
    if response.status != 200:
        return tally.harmed("failed", began, f"{response.status} {content[:300].decode(errors='replace')}")
    answer = json.loads(content)["outputs"][0]["data"]
    factor = f"{answer[0] / question[0]:.4f}"
    if len(answer) != WIDTH or any(f"{a / q:.4f}" != factor for a, q in zip(answer, question, strict=True)):
        return tally.harmed("wrong", began, f"{question} -> {answer}")
    return tally.answered(asker, factor)


def keep_asking(host: str, name: str, asker: int, tally: Tally) -> None:
    while True:
        ask(host, name, asker, tally)
        time.sleep(PAUSE_S)


def main(host: str, name: str, askers: str) -> None:
    tally = Tally()
    for asker in range(int(askers)):
        threading.Thread(target=keep_asking, args=(host, name, asker, tally), daemon=True).start()
    while True:
        print(tally.line(), flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
