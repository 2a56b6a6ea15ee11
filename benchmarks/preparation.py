"""Makes the workloads: models as files, an `ensemble.yaml`, rows to ask, and the answers that are right.

The right answers come from the networks before they are exported (ImageNet-lite: from the exported program,
unoptimised), each followed by its softmax and averaged in FP64: nothing of the system under test has a part in them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
import yaml

from benchmarks import networks
from benchmarks.workloads import ATOL, CACHE, NAMES, RTOL, VERSION, Array, Workload, path_of, read
from ensemble_contract.plan import ModelSource
from ensemble_contract.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

IMAGENET_LITE = Path(__file__).parent.parent / "examples" / "imagenet-lite"
INPUT, OUTPUT = "input", "probabilities"


def prepare(name: str, cache: Path = CACHE) -> Workload:
    """The workload, made if it is not there yet.

    Raises ValueError for an unknown name, or if answers of different rows are too alike to be told apart.
    """
    folder = (cache / name).resolve()
    try:
        made_s = (folder / "workload.json").stat().st_mtime
        workload = read(folder)
        if workload.version == VERSION and all(path_of(m).stat().st_mtime <= made_s for m in workload.members):
            return workload
    except (OSError, msgspec.MsgspecError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tiny":
        return make(name, folder, networks.MLPS, (64,), 256, (1, 8, 32, 64, 128, 256, 512, 1024))
    if name == "cnn":
        return make(name, folder, networks.CNNS, (3, 32, 32), 256, (1, 4, 8, 16, 32, 64, 128))
    if name == "imagenet":
        return _imagenet(folder)
    raise ValueError(f"workload {name!r}: must be one of {', '.join(NAMES)}")


def run_script(path: Path) -> None:
    """Run an example's script that makes its models."""
    subprocess.run([sys.executable, str(path)], check=True)


def make(
    name: str,
    folder: Path,
    makers: Sequence[Callable[[], nn.Module]],
    row_shape: tuple[int, ...],
    count: int,
    batch_sizes: tuple[int, ...],
) -> Workload:
    """A workload of these networks in `folder`, with `count` rows of normal noise."""
    rows = np.random.default_rng(1).standard_normal((count, *row_shape), dtype=np.float32)
    inputs = torch.from_numpy(rows)
    answers, members = [], []
    for index, make in enumerate(makers):
        network = networks.build(make, seed=index + 1, rows=inputs[:64])
        path = folder / f"member{index}.pt2"
        # Two rows: torch.export takes a size of one for a constant.
        batch = {0: torch.export.Dim("batch", min=1, max=65_536)}
        torch.export.save(torch.export.export(network, (inputs[:2],), dynamic_shapes=(batch,)), path)
        members.append(_source(f"member{index}", path))
        answers.append(_softmax(network, inputs))
    spec = TensorSpec(INPUT, "FP32", row_shape)
    output = TensorSpec(OUTPUT, "FP32", (networks.CLASSES,))
    return _write(Workload(name, str(folder), spec, output, tuple(members), batch_sizes), rows, np.stack(answers))


def _imagenet(folder: Path) -> Workload:
    resource = yaml.safe_load((IMAGENET_LITE / "ensemble.yaml").read_text())["spec"]
    paths = {m["name"]: _local_path(m["model"]["uri"]) for m in resource["members"]}
    if not all(p.exists() for p in paths.values()):
        run_script(IMAGENET_LITE / "export.py")
    spec, output = msgspec.convert(resource["input"], TensorSpec), msgspec.convert(resource["output"], TensorSpec)
    generator = np.random.default_rng(1)
    # Coarse blobs, not noise: networks trained on photographs answer all noise alike.
    coarse = torch.from_numpy(generator.uniform(0, 255, (64, spec.shape[0], 8, 8)).astype(np.float32))
    images = torch.nn.functional.interpolate(coarse, size=spec.shape[1:], mode="bilinear")
    rows = images.numpy().astype(spec.dtype)
    answers = [_softmax(torch.export.load(path).module(), torch.from_numpy(rows), chunk=8) for path in paths.values()]
    members = tuple(_source(name, path) for name, path in paths.items())
    return _write(
        Workload("imagenet", str(folder), spec, output, members, (1, 2, 4, 8, 16, 32)), rows, np.stack(answers)
    )


def _local_path(uri: str) -> Path:
    return (IMAGENET_LITE / uri.removeprefix("file://").removeprefix("file:")).resolve()


def _source(name: str, path: Path) -> ModelSource:
    return ModelSource(name=name, digest=name, uri=path.as_uri(), format="torch-export", activation="softmax")


def _softmax(network: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, chunk: int = 64) -> Array:
    with torch.inference_mode():
        return torch.cat([torch.softmax(network(part).double(), -1) for part in torch.split(inputs, chunk)]).numpy()


def _write(workload: Workload, rows: Array, answers: Array) -> Workload:
    expected = answers.mean(axis=0)
    _check_distinct(workload.name, expected)
    folder = Path(workload.folder)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "expected.npy", expected.astype(np.float32))
    np.save(folder / "expected_of_members.npy", answers.astype(np.float32))
    resource = {
        "apiVersion": "ensemble-operator.io/v1alpha1",
        "kind": "InferenceEnsemble",
        "metadata": {"name": workload.model},
        "spec": {
            "members": [
                {"name": m.name, "model": {"uri": m.uri}, "activation": m.activation} for m in workload.members
            ],
            "input": msgspec.to_builtins(workload.input),
            "output": msgspec.to_builtins(workload.output),
            "combine": {"rule": "mean"},
            "batching": {"sizes": list(workload.batch_sizes)},
        },
    }
    workload.resource.write_text(yaml.safe_dump(resource, sort_keys=False))
    # Last and at once, so that a folder half made is never taken for a whole one.
    temporary = folder / "workload.json.part"
    temporary.write_bytes(msgspec.json.encode(workload))
    temporary.replace(folder / "workload.json")
    return workload


def _check_distinct(name: str, expected: Array) -> None:
    distances = np.abs(expected[:, None] - expected[None]).max(axis=-1)
    np.fill_diagonal(distances, np.inf)
    if distances.min() < 20 * (RTOL + ATOL):
        raise ValueError(
            f"workload {name!r}: two rows have answers only {distances.min():.1e} apart: a swap would go unnoticed"
        )
