"""Asks the served ImageNet ensemble what is on a photograph, with nothing but a stock V2 client.

Prints the best five classes of every member and of the ensemble, and how long an answer takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as v2
from skimage import data, io, transform
from tritonclient.utils import InferenceServerException

HERE = Path(__file__).resolve().parent
ENSEMBLE = "imagenet"
INPUT, OUTPUT = "image", "probabilities"
PIXELS = 260
BEST = 5
COLUMN = 22

Array = np.ndarray[Any, np.dtype[Any]]


def load_photograph(path: Path | None) -> Array:
    """The middle square of a photograph (default: the cat of scikit-image) as UINT8 [3, 260, 260], RGB."""
    photograph = data.chelsea() if path is None else io.imread(path)
    if photograph.ndim != 3 or photograph.shape[2] < 3:
        raise SystemExit(f"{path}: not a colour photograph, its array has the shape {photograph.shape}")
    height, width, _ = photograph.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = photograph[top : top + side, left : left + side, :3]
    resized = transform.resize(square, (PIXELS, PIXELS), anti_aliasing=True)
    return np.ascontiguousarray(np.rint(resized * 255).astype(np.uint8).transpose(2, 0, 1))


def as_input(photograph: Array, binary: bool) -> v2.InferInput:
    """A request's input of one row."""
    rows = photograph[np.newaxis]
    tensor = v2.InferInput(INPUT, list(rows.shape), "UINT8")
    tensor.set_data_from_numpy(rows, binary_data=binary)
    return tensor


def save_request(photograph: Array, path: Path) -> None:
    """Write the body of a JSON request for the best five classes, for `curl` to send."""
    wish = v2.InferRequestedOutput(OUTPUT, binary_data=False, class_count=BEST)
    body, _ = v2.InferenceServerClient.generate_request_body([as_input(photograph, binary=False)], outputs=[wish])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def best_classes(result: v2.InferResult, labels: list[str]) -> dict[str, list[str]]:
    """The best classes of every output in an answer, as `probability name`, by the name of who says so."""
    answers = {output["name"]: result.as_numpy(output["name"])[0] for output in result.get_response()["outputs"]}
    return {
        name.removesuffix(OUTPUT).removesuffix(".") or "ensemble": [
            f"{row[index]:.2f} {labels[index]}" for index in np.argsort(-row, kind="stable")[:BEST]
        ]
        for name, row in sorted(answers.items(), key=lambda answer: answer[0] == OUTPUT)
    }


def print_columns(columns: dict[str, list[str]]) -> None:
    """A column for each member, the ensemble's last."""
    for line in [list(columns), *map(list, zip(*columns.values(), strict=True))]:
        print("  ".join(cell[:COLUMN].ljust(COLUMN) for cell in line).rstrip())


def latencies_ms(client: v2.InferenceServerClient, tensor: v2.InferInput, requests: int) -> list[float]:
    """How long each of some requests took, one after the other."""
    taken_ms = []
    for _ in range(requests):
        started_s = time.perf_counter()
        client.infer(ENSEMBLE, [tensor])
        taken_ms.append((time.perf_counter() - started_s) * 1e3)
    return taken_ms


def ask(client: v2.InferenceServerClient, tensor: v2.InferInput, labels: list[str], requests: int) -> None:
    """Print what the members and the ensemble say, and how long it takes."""
    result = client.infer(ENSEMBLE, [tensor], parameters={"members": True})
    print_columns(best_classes(result, labels))
    if missing := result.get_response()["parameters"]["members_missing"]:
        print(f"without an answer from {missing}")
    if taken_ms := latencies_ms(client, tensor, requests):
        fastest, median = min(taken_ms), statistics.median(taken_ms)
        print(f"\n{requests} requests one after the other: median {median:.1f} ms, fastest {fastest:.1f} ms")


def main() -> None:
    """Ask, print, measure."""
    parser = argparse.ArgumentParser(description="Classify a photograph with the served ImageNet ensemble.")
    parser.add_argument("photograph", type=Path, nargs="?", help="an image file (default: the cat of scikit-image)")
    parser.add_argument("--url", default="localhost:8000", help="host and port of the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20, help="how many to measure with (default: %(default)s)")
    parser.add_argument("--save-request", type=Path, metavar="FILE", help="also write the request as JSON, for curl")
    options = parser.parse_args()
    photograph = load_photograph(options.photograph)
    labels = (HERE / "labels.txt").read_text().splitlines()
    if options.save_request:
        save_request(photograph, options.save_request)
    tensor = as_input(photograph, binary=True)
    try:
        with v2.InferenceServerClient(options.url) as client:
            ask(client, tensor, labels, options.requests)
    except (OSError, InferenceServerException) as error:
        raise SystemExit(f"no answer from {options.url}: {error} (is `make serve` running there?)") from None


if __name__ == "__main__":
    main()
