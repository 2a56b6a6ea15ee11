"""Sends the test digits through the served ensemble, with nothing but a stock V2 client.

Prints how often each member is right, and how often the ensemble is.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import tritonclient.http as v2
from sklearn.datasets import load_digits
from tritonclient.utils import InferenceServerException

ENSEMBLE = "digits"
INPUT, OUTPUT = "pixels", "probabilities"
# The digits before this one are those that the members were trained and weighed with.
FIRST_TEST_ROW = 600

Array = np.ndarray[Any, np.dtype[Any]]


def test_digits() -> tuple[Array, Array]:
    """Digits FP32 [rows, 1, 8, 8] and their classes."""
    images, classes = load_digits(return_X_y=True)
    return images[FIRST_TEST_ROW:].astype(np.float32).reshape(-1, 1, 8, 8), classes[FIRST_TEST_ROW:]


def infer(client: v2.InferenceServerClient, rows: Array) -> dict[str, Array]:
    """The probabilities of some rows, by member, and the ensemble's."""
    tensor = v2.InferInput(INPUT, list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    result = client.infer(ENSEMBLE, [tensor], parameters={"members": True})
    names = sorted((output["name"] for output in result.get_response()["outputs"]), key=lambda name: name == OUTPUT)
    return {name.removesuffix(OUTPUT).removesuffix(".") or "ensemble": result.as_numpy(name) for name in names}


def main() -> None:
    """Send all rows in a few requests, and compare."""
    parser = argparse.ArgumentParser(description="Test the served digits ensemble.")
    parser.add_argument("--url", default="localhost:8000", help="host and port of the server (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="rows of one request (default: %(default)s)")
    options = parser.parse_args()
    digits, classes = test_digits()
    started_s = time.perf_counter()
    try:
        with v2.InferenceServerClient(options.url) as client:
            starts = range(0, len(digits), options.rows)
            parts = [infer(client, digits[start : start + options.rows]) for start in starts]
    except (OSError, InferenceServerException) as error:
        raise SystemExit(f"no answer from {options.url}: {error} (is the ensemble served there?)") from None
    taken_s = time.perf_counter() - started_s
    for name in parts[0]:
        right = np.concatenate([part[name].argmax(-1) for part in parts]) == classes
        print(f"{name:<18}{right.mean():>8.2%}")
    print(f"\n{len(digits)} digits in {len(parts)} requests: {taken_s:.2f} s")


if __name__ == "__main__":
    main()
