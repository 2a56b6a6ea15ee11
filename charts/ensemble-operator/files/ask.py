"""Asks an ensemble until it answers: `ask.py URL NAME`. The answer must be twice the question."""

# ruff: noqa: S310, T201  # it asks what the chart names, and prints for the log of the test

import http.client
import json
import sys
import time
import urllib.error
import urllib.request

WAIT_S = 240
QUESTION = [1.0, 2.0, 3.0, 4.0]


def ask(url: str, name: str) -> list[float]:
    """The numbers that the ensemble answers."""
    tensor = {"name": "numbers", "datatype": "FP32", "shape": [1, len(QUESTION)], "data": QUESTION}
    body = json.dumps({"inputs": [tensor]}).encode()
    request = urllib.request.Request(f"{url}/v2/models/{name}/infer", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        numbers: list[float] = json.load(answer)["outputs"][0]["data"]
    return numbers


def main(url: str, name: str) -> int:
    """Wait for an answer and check it; the exit code."""
    deadline = time.monotonic() + WAIT_S
    why = ""
    while time.monotonic() < deadline:
        try:
            answer = ask(url, name)
        except (OSError, http.client.HTTPException) as error:
            if str(error) != why:
                why = str(error)
                print(f"not yet: {why}", flush=True)
            time.sleep(1)
            continue
        print(f"{QUESTION} -> {answer}", flush=True)
        return int(answer != [2 * value for value in QUESTION])
    print(f"no answer of {url} after {WAIT_S} s: kubectl describe inferenceensemble/{name} says why", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
