"""The worker's figures in Prometheus' text format (version 0.0.4). Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ensemble_worker.devices import Device
from ensemble_worker.loop import Running

_COUNTERS: tuple[tuple[str, str, Callable[[Running], float]], ...] = (
    ("ensemble_worker_batches_total", "Batches run.", lambda running: running.batches),
    ("ensemble_worker_rows_total", "Rows run.", lambda running: running.rows),
    ("ensemble_worker_compute_seconds_total", "Time spent on batches.", lambda running: running.compute_ns * 1e-9),
    ("ensemble_worker_failed_batches_total", "Batches that failed.", lambda running: running.failures),
)


def exposition(device: Device, running: Sequence[Running], instances: Iterable[dict[str, Any]]) -> str:
    """One metric family after the other, with the labels `device` and `member`."""
    lines = []
    for name, text, value in _COUNTERS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
        lines += [f"{name}{_labels(device, one.member)} {value(one):g}" for one in running]
    name = "ensemble_worker_instance_ready"
    lines += [f"# HELP {name} 1 if the instance answers, 0 if it is loading or has failed.", f"# TYPE {name} gauge"]
    for instance in instances:
        lines.append(f"{name}{_labels(device, instance['member'])} {int(instance['state'] == 'ready')}")
    return "\n".join(lines) + "\n"


def _labels(device: Device, member: str) -> str:
    return f'{{device="{_escaped(device.name)}",member="{_escaped(member)}"}}'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
