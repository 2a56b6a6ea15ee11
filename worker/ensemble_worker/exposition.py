"""The worker's figures in Prometheus' text format (version 0.0.4). Pure.

Series are by member, not by instance, and only of members of the present plan: at most 64 of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ensemble_worker.loop import Running

STATES = ("fetching", "loading", "ready", "failed", "draining")


@dataclass(frozen=True, slots=True)
class Counters:
    """What instances have done; those of a member are added up, also of instances that have left."""

    batches: int = 0
    rows: int = 0
    compute_s: float = 0.0
    failures: int = 0

    def plus(self, running: Running) -> Counters:
        """With what an instance has done."""
        return Counters(
            self.batches + running.batches,
            self.rows + running.rows,
            self.compute_s + running.compute_ns * 1e-9,
            self.failures + running.failures,
        )


COUNTED: tuple[tuple[str, str, Callable[[Counters], float]], ...] = (
    ("batches_total", "Batches run.", lambda one: one.batches),
    ("rows_total", "Rows run.", lambda one: one.rows),
    ("compute_seconds_total", "Time spent on batches.", lambda one: one.compute_s),
    ("failed_batches_total", "Batches that failed.", lambda one: one.failures),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What /metrics shows. `states` are (member, state) of every instance, `memory_bytes` is by member."""

    device: str
    device_class: str
    capacity_bytes: int
    overhead_bytes: int
    held_bytes: int
    generation: int
    gateways: int
    busy_s: float
    waiting_batches: int
    counters: Mapping[str, Counters]
    states: Sequence[tuple[str, str]]
    memory_bytes: Mapping[str, int]
    profile_running: bool
    profile_points: int


def exposition(figures: Figures) -> str:
    """One metric family after the other, with the labels `device` and, where it is one's, `member`."""
    device = {"device": figures.device}
    by_member = {name: {**device, "member": name} for name in figures.counters}
    ready = {name for name, state in figures.states if state == "ready"}
    members = dict.fromkeys(name for name, state in figures.states if state != "draining")
    families = [
        _family("device_info", "gauge", "The device.", [({**device, "device_class": figures.device_class}, 1)]),
        *(
            _family(name, "counter", text, [(labels, pick(figures.counters[one])) for one, labels in by_member.items()])
            for name, text, pick in COUNTED
        ),
        _family(
            "instance_ready", "gauge", "1 if an instance of the member answers, 0 if it is loading or has failed.",
            [({**device, "member": name}, int(name in ready)) for name in members],
        ),
        _family(
            "instances", "gauge", "Instances by state.",
            [({**device, "state": one}, sum(state == one for _, state in figures.states)) for one in STATES],
        ),
        _family(
            "instance_memory_bytes", "gauge", "What the process grew by while instances of the member were loaded.",
            [({**device, "member": name}, held) for name, held in figures.memory_bytes.items()],
        ),
        *(
            _family(name, kind, text, [(device, value)])
            for name, kind, text, value in (
                ("device_capacity_bytes", "gauge", "Memory of the device.", figures.capacity_bytes),
                ("overhead_bytes", "gauge", "Memory that the worker takes without a member.", figures.overhead_bytes),
                ("held_bytes", "gauge", "Memory that the worker holds on the device.", figures.held_bytes),
                ("plan_generation", "gauge", "Generation of the plan that runs.", figures.generation),
                ("gateways", "gauge", "Gateways that are connected.", figures.gateways),
                ("busy_seconds", "gauge", "How long the oldest running batch has been running.", figures.busy_s),
                ("waiting_batches", "gauge", "Batches received that have not begun.", figures.waiting_batches),
                ("profile_running", "gauge", "1 while members are measured.", int(figures.profile_running)),
                ("profile_points_total", "counter", "Batch sizes measured.", figures.profile_points),
            )
        ),
    ]  # fmt: skip
    return "\n".join(line for family in families for line in family) + "\n"


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> list[str]:
    name = f"ensemble_worker_{name}"
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return lines + [f"{name}{{{_labels(labels)}}} {value:.15g}" for labels, value in samples]


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
