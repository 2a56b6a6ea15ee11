"""A workload behind mosec: one stage whose worker runs all members in turn and averages them.

The members run by our workers' code, or plainly: as PyTorch loads an exported program.

`python -m benchmarks.peers.mosec_server --port N …`, where mosec reads its own arguments from the same command line
and this module its settings from the environment, as mosec's workers are spawned without a command line of ours. Each
worker touches a file of its number once it is loaded. Bodies are the bare bytes of the tensors, the least that a peer
can be asked to parse.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from mosec import Server, Worker

from benchmarks import workloads
from benchmarks.plain_member import PlainMember
from ensemble_worker import devices, predictor

SETTINGS_VARIABLE = "BENCHMARK_MOSEC"
NUMBER_VARIABLE = "BENCHMARK_MOSEC_WORKER"
READY_VARIABLE = "BENCHMARK_MOSEC_READY"
TIMEOUT_MS = 300_000


class MosecSettings(msgspec.Struct, frozen=True):
    """How mosec is set up: processes, torch threads of each, the batch limit in requests, the wait for more of them.

    `plain` is how members run: as `torch.export.load` gives them, and not by our workers' code.
    """

    folder: str
    processes: int
    threads: int
    max_batch: int
    max_wait_ms: int
    cores: tuple[int, ...]
    plain: bool = False

    def __str__(self) -> str:
        members = ", plain" if self.plain else ""
        return f"{self.processes}x{self.threads} batch {self.max_batch} wait {self.max_wait_ms} ms{members}"


class EnsembleWorker(Worker):
    """All members in one process."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        settings = _settings()
        self._workload = workloads.read(settings.folder)
        self._batch_limit = max(self._workload.batch_sizes)
        number = int(os.environ[NUMBER_VARIABLE])
        cores = settings.cores[number * settings.threads : (number + 1) * settings.threads]
        predictor.prepare_cpu(cores, pin=True)
        device = devices.cpu_device(number, cores, devices.free_memory_bytes())
        spec, output = self._workload.input, self._workload.output
        self._members = [
            PlainMember(workloads.path_of(m))
            if settings.plain
            else predictor.load(workloads.path_of(m), m, (spec,), (output,), device, self._batch_limit)
            for m in self._workload.members
        ]
        # mosec says that it is ready when its first worker is.
        (Path(os.environ[READY_VARIABLE]) / str(number)).touch()

    def deserialize(self, data: bytes) -> bytes:
        """The body as it came."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """The answer's bytes."""
        return data

    def forward(self, data: Any) -> Any:
        """The mean of the members for one body, or for a list of bodies where batches are on."""
        if not isinstance(data, list):
            return self._answer(data).tobytes()
        answers = self._answer(b"".join(data))
        ends = np.cumsum([len(body) // self._workload.input.row_bytes for body in data])
        return [part.tobytes() for part in np.split(answers, ends[:-1])]

    def _answer(self, body: bytes) -> workloads.Array:
        spec = self._workload.input
        rows = np.frombuffer(body, spec.dtype).reshape(-1, *spec.shape)
        parts = [rows[i : i + self._batch_limit] for i in range(0, len(rows), self._batch_limit)]
        with predictor.running_models():
            means = [np.mean([member.run([part])[0] for member in self._members], axis=0) for part in parts]
        return means[0] if len(means) == 1 else np.concatenate(means)


def _settings() -> MosecSettings:
    return msgspec.json.decode(os.environ[SETTINGS_VARIABLE], type=MosecSettings)


def main() -> None:
    """Serve until SIGTERM."""
    settings = _settings()
    server = Server()  # type: ignore[no-untyped-call]
    server.append_worker(
        EnsembleWorker,
        num=settings.processes,
        max_batch_size=settings.max_batch,
        max_wait_time=settings.max_wait_ms,
        timeout=TIMEOUT_MS / 1000,
        env=[{NUMBER_VARIABLE: str(number)} for number in range(settings.processes)],
    )
    server.run()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
