"""Trains four small, different networks on scikit-learn's handwritten digits and exports them to `models/*.pt2`.

Prints how often each member is right, and how often each combination rule is: the reason why people ensemble. The rules
are those of the gateway, so that the served ensemble answers exactly this well.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ensemble_contract.plan import RULES
from ensemble_gateway.combiner import make_rule

Array = np.ndarray[Any, np.dtype[Any]]
HERE = Path(__file__).resolve().parent
CLASSES = 10
BRIGHTEST = 16.0
TRAIN_ROWS, VALIDATION_ROWS = 400, 200
BATCH_ROWS = 50
MAX_BATCH_ROWS = 65_536


class Digits(nn.Module):
    """A network behind its own normalisation: FP32 [batch, 1, 8, 8] with values 0..16 to logits [batch, 10]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of digits."""
        logits: torch.Tensor = self.network(pixels / BRIGHTEST - 0.5)
        return logits


class RandomFeatures(nn.Module):
    """A linear classifier over fixed random cosine features, which approximate a Gaussian kernel.

    Rahimi and Recht, Random features for large-scale kernel machines, 2007, algorithm 1.
    """

    def __init__(self, inputs: int, features: int, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(inputs, features) / bandwidth)
        self.register_buffer("phases", torch.rand(features) * 2 * math.pi)
        self.scale = math.sqrt(2 / features)
        self.linear = nn.Linear(features, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of digits."""
        projected = pixels.flatten(1) @ self.get_buffer("frequencies") + self.get_buffer("phases")
        logits: torch.Tensor = self.linear(10 * self.scale * torch.cos(projected))
        return logits


@dataclass(frozen=True, slots=True)
class Split:
    """Digits FP32 [rows, 1, 8, 8] and their classes INT64 [rows]."""

    pixels: torch.Tensor
    classes: torch.Tensor


def networks() -> dict[str, nn.Module]:
    """The four untrained members."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    cnn = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 4 * 4, CLASSES)
    )
    deep_cnn = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.4),
        nn.Linear(16 * 4 * 4, CLASSES),
    )
    kernel = RandomFeatures(64, features=1024, bandwidth=1.4)
    return {"mlp": mlp, "cnn": cnn, "deep-cnn": deep_cnn, "random-features": kernel}


def load_splits() -> tuple[Split, Split, Split]:
    """Digits to train with, to weigh the members with, and to test with: mostly of other writers than the first two.

    In the order of the data set, so that a client can find the test digits without this script.
    """
    images, classes = load_digits(return_X_y=True)
    first_test_row = TRAIN_ROWS + VALIDATION_ROWS
    return (
        split_of(images[:TRAIN_ROWS], classes[:TRAIN_ROWS]),
        split_of(images[TRAIN_ROWS:first_test_row], classes[TRAIN_ROWS:first_test_row]),
        split_of(images[first_test_row:], classes[first_test_row:]),
    )


def split_of(images: Array, classes: Array) -> Split:
    """Flat FP64 images [rows, 64] as a split."""
    pixels = torch.from_numpy(images.astype(np.float32).reshape(-1, 1, 8, 8))
    return Split(pixels, torch.from_numpy(classes.astype(np.int64)))


def train(member: nn.Module, split: Split, epochs: int) -> None:
    """Fit a member with AdamW under a one-cycle learning rate."""
    steps = -(-len(split.classes) // BATCH_ROWS)
    optimiser = torch.optim.AdamW(member.parameters(), lr=0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.01, total_steps=epochs * steps)
    member.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(split.classes)), BATCH_ROWS):
            optimiser.zero_grad()
            torch.autograd.backward(cross_entropy(member(split.pixels[rows]), split.classes[rows]))
            optimiser.step()
            schedule.step()
    member.eval()


@torch.inference_mode()
def probabilities(member: nn.Module, split: Split) -> Array:
    """Softmax probabilities FP32 [rows, 10]."""
    answer: Array = member(split.pixels).softmax(-1).numpy()
    return answer


def accuracy(scores: Array, split: Split) -> float:
    """Share of rows whose highest score is that of their class."""
    return float((scores.argmax(-1) == split.classes.numpy()).mean())


def brier_score(scores: Array, split: Split) -> float:
    """Squared distance of probabilities from the truth, 0 is best: how far they can be believed (G. W. Brier, 1950)."""
    truth = np.eye(CLASSES, dtype=np.float32)[split.classes.numpy()]
    return float(((scores - truth) ** 2).sum(-1).mean())


def log_odds(share: float) -> float:
    """Weight of a member that is right with this probability.

    The best one where members err independently: Shapley and Grofman, Optimizing group judgmental accuracy in the
    presence of interdependencies, 1984.
    """
    return math.log(share / (1 - share))


def export(member: nn.Module, target: Path) -> None:
    """Write a member's `.pt2` with a dynamic batch; a run that is interrupted leaves no half-written file."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH_ROWS)
    with torch.no_grad():
        program = torch.export.export(member, (torch.zeros(2, 1, 8, 8),), dynamic_shapes={"pixels": {0: batch}})
    unfinished = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        torch.export.save(program, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def report(members: dict[str, nn.Module], validation: Split, test: Split) -> None:
    """Print how good each member and each combination rule is on the test digits."""
    answers = [probabilities(member, test) for member in members.values()]
    # A member without a mistake would weigh infinitely much: half a mistake is the usual correction.
    best = 1 - 0.5 / len(validation.classes)
    weights = [log_odds(min(accuracy(probabilities(m, validation), validation), best)) for m in members.values()]
    print(f"\n{'member':<18}{'accuracy':>9}{'Brier':>9}{'weight':>9}")
    for name, answer, weight in zip(members, answers, weights, strict=True):
        print(f"{name:<18}{accuracy(answer, test):>9.2%}{brier_score(answer, test):>9.4f}{weight:>9.2f}")
    print(f"\n{'rule':<18}{'accuracy':>9}{'Brier':>9}")
    everyone = tuple(range(len(answers)))
    for rule in (rule for rule in RULES if rule != "none"):
        combined = make_rule(rule, weights, softmax=True).combine(np.stack(answers), everyone)
        print(f"{rule:<18}{accuracy(combined, test):>9.2%}{brier_score(combined, test):>9.4f}")


def main() -> None:
    """Train, export and report."""
    parser = argparse.ArgumentParser(description="Train four digit classifiers and export them to .pt2 files.")
    parser.add_argument("--out", type=Path, default=HERE / "models", help="folder of the files (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training digits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    training, validation, test = load_splits()
    print(f"{len(training.classes)} digits to train, {len(validation.classes)} to weigh, {len(test.classes)} to test")
    members: dict[str, nn.Module] = {name: Digits(network) for name, network in networks().items()}
    for name, member in members.items():
        started_s = time.monotonic()
        train(member, training, options.epochs)
        export(member, options.out / f"{name}.pt2")
        print(f"{options.out / name}.pt2: trained in {time.monotonic() - started_s:.1f} s")
    report(members, validation, test)


if __name__ == "__main__":
    main()
