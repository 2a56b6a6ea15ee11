"""The worker's /metrics: one series a member, however many instances and versions of it there are."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from ensemble_worker.exposition import Counters, Figures, exposition

FIGURES = Figures(
    device="cuda-0",
    device_class='A "GPU"',
    capacity_bytes=80 << 30,
    overhead_bytes=1 << 29,
    held_bytes=3 << 30,
    generation=1_234_567_890_123,
    gateways=2,
    busy_s=0.25,
    waiting_batches=3,
    counters={"small": Counters(10, 320, 1.5, 1), "big": Counters()},
    states=[("small", "ready"), ("small", "loading"), ("big", "failed"), ("old", "draining")],
    memory_bytes={"small": 5, "big": 0},
    profile_running=True,
    profile_points=7,
)


def test_every_figure_is_there_once() -> None:
    samples = [s for family in text_string_to_metric_families(exposition(FIGURES)) for s in family.samples]
    found = {
        (s.name.removeprefix("ensemble_worker_"), *map(s.labels.get, ("member", "state"))): s.value for s in samples
    }
    assert len(found) == len(samples)
    assert {s.labels["device"] for s in samples} == {"cuda-0"}
    assert found["batches_total", "small", None] == 10
    assert found["rows_total", "small", None] == 320
    assert found["compute_seconds_total", "small", None] == 1.5
    assert found["failed_batches_total", "small", None] == 1
    assert [found["instance_ready", name, None] for name in ("small", "big")] == [1, 0]
    assert ("instance_ready", "old", None) not in found
    states = {
        state: found["instances", None, state] for state in ("fetching", "loading", "ready", "failed", "draining")
    }
    assert states == {"fetching": 0, "loading": 1, "ready": 1, "failed": 1, "draining": 1}
    assert found["plan_generation", None, None] == 1_234_567_890_123
    assert found["device_capacity_bytes", None, None] == 80 << 30
    assert found["profile_running", None, None] == 1
    assert found["profile_points_total", None, None] == 7


def test_text_of_labels_is_escaped() -> None:
    assert 'device_class="A \\"GPU\\""' in exposition(FIGURES)
