"""What is served and asked: models as files, distinct rows, and the answers that are right.

No torch here: load generators import this too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

RTOL = 1e-4
ATOL = 1e-5
CACHE = Path("build/bench")
NAMES = ("tiny", "cnn", "imagenet")
# Written to each folder; a folder of another version is made again.
VERSION = 2


class Workload(msgspec.Struct, frozen=True):
    """An ensemble on disk, averaged over its members' softmax. `batch_sizes` are those that all may choose from."""

    name: str
    folder: str
    input: TensorSpec
    output: TensorSpec
    members: tuple[ModelSource, ...]
    batch_sizes: tuple[int, ...]
    version: int = VERSION

    @property
    def resource(self) -> Path:
        """The file for `ensemble serve`."""
        return Path(self.folder) / "ensemble.yaml"

    @property
    def model(self) -> str:
        """The name that clients ask for."""
        return f"bench-{self.name}"

    def rows(self) -> Array:
        """Distinct input rows, at least 64: (rows, *input.shape)."""
        return np.asarray(np.load(Path(self.folder) / "rows.npy"))

    def expected(self) -> Array:
        """The ensemble's answer for each row, FP32: (rows, *output.shape)."""
        return np.asarray(np.load(Path(self.folder) / "expected.npy"))

    def expected_of_members(self) -> Array:
        """Each member's answer for each row, FP32: (members, rows, *output.shape)."""
        return np.asarray(np.load(Path(self.folder) / "expected_of_members.npy"))


def read(folder: str | Path) -> Workload:
    """A workload that was prepared; its folder may have moved, its models not."""
    workload = msgspec.json.decode((Path(folder) / "workload.json").read_bytes(), type=Workload)
    return msgspec.structs.replace(workload, folder=str(folder))


def path_of(source: ModelSource) -> Path:
    """The file of a member; the members of the benchmarks are all on this machine."""
    return Path(source.uri.removeprefix("file://"))


def matches(answers: Array, expected: Array) -> Array:
    """Which answers are right, a flag for each of the first axis: within RTOL and ATOL throughout; NaN never is."""
    close = np.abs(answers - expected) <= ATOL + RTOL * np.abs(expected)
    return np.asarray(close.reshape(len(close), -1).all(axis=1))
