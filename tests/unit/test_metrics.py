"""Counters, their Prometheus text (read back by prometheus_client's parser) and the V2 statistics."""

from __future__ import annotations

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from ensemble_contract.plan import GatewayPlan, ServedMember
from ensemble_contract.tensors import TensorSpec
from ensemble_gateway.exposition import exposition
from ensemble_gateway.metrics import ENSEMBLE, Failure, Gauges, Histogram, Metrics
from ensemble_gateway.request import Model
from ensemble_gateway.served import served_models
from ensemble_gateway.statistics_v2 import model_statistics

GAUGES = Gauges(
    store_rows=lambda: 5,
    store_bytes=lambda: 640,
    store_capacity_bytes=lambda: 1024,
    pending_requests=lambda model_index: 10 + model_index,
    live_instances=lambda member_index: 2 - member_index,
)


def models(*members: str, version: str = "1") -> list[Model]:
    plan = GatewayPlan(
        generation=1,
        ensemble="pets",
        inputs=(TensorSpec("x", "FP32", (4,)),),
        outputs=(TensorSpec("y", "FP32", (3,)),),
        members=tuple(ServedMember(name, "digest", version=version) for name in members),
        workers=(),
    )
    return list(served_models(plan).values())


def metrics_of_some_traffic() -> Metrics:
    metrics = Metrics(models("small", "big"), GAUGES, clock=lambda: 1700000000.25)
    metrics.batch_done(0, rows=4, queue_s=0.003, compute_s=0.002, requests=3)
    metrics.batch_done(1, rows=4, queue_s=0.001, compute_s=0.008, requests=3)
    metrics.batch_done(1, rows=64, queue_s=0.0, compute_s=0.05)
    metrics.request_done(ENSEMBLE, rows=2, duration_s=0.011)
    metrics.request_done(ENSEMBLE, rows=2, duration_s=0.009)
    metrics.request_done(2, rows=64, duration_s=0.051)
    metrics.failed(ENSEMBLE, Failure.REJECTED)
    metrics.failed(ENSEMBLE, Failure.CANCELED, duration_s=0.5)
    metrics.combined(rows=4, duration_s=0.00001)
    metrics.answered_by_quorum(missing=(0,))
    return metrics


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(exposition(metrics))}


def value(metrics: Metrics, sample_name: str, **labels: str) -> float:
    names = {sample_name, f"{sample_name}_total"}  # the parser appends _total to the names of counters
    found = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name in names and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{sample_name} {labels}: {len(found)} samples"
    return found[0]


def test_nv_metrics_have_tritons_names_and_are_true_for_parallel_members() -> None:
    metrics = metrics_of_some_traffic()
    assert '\nnv_inference_count{model="pets.big",version="1"} 68\n' in exposition(metrics)
    of_ensemble = {
        "request_success": 2,
        "count": 4,
        "exec_count": 2,
        "request_duration_us": 20_000,
        "queue_duration_us": 0,
        "compute_infer_duration_us": 0,
        "pending_request_count": 10,
    }
    of_big = {
        "request_success": 4,
        "count": 68,
        "exec_count": 2,
        "request_duration_us": 75_000,
        "queue_duration_us": 1_000,
        "compute_infer_duration_us": 74_000,
        "pending_request_count": 12,
    }
    for model, wanted in (("pets", of_ensemble), ("pets.big", of_big)):
        for name, number in wanted.items():
            assert value(metrics, f"nv_inference_{name}", model=model, version="1") == number, (model, name)
    assert value(metrics, "nv_inference_request_failure", model="pets", reason="REJECTED") == 1
    assert value(metrics, "nv_inference_request_failure", model="pets", reason="CANCELED") == 1
    assert value(metrics, "nv_inference_request_failure", model="pets", reason="TIMEOUT") == 0
    assert value(metrics, "nv_inference_request_failure", model="pets.big", reason="BACKEND") == 0


def test_the_gateways_own_metrics() -> None:
    metrics = metrics_of_some_traffic()
    assert value(metrics, "ensemble_batch_rows_bucket", model="pets.big", le="2") == 0
    assert value(metrics, "ensemble_batch_rows_bucket", model="pets.big", le="4") == 1
    assert value(metrics, "ensemble_batch_rows_bucket", model="pets.big", le="64") == 2
    assert value(metrics, "ensemble_batch_rows_sum", model="pets.big") == 68
    assert value(metrics, "ensemble_batch_compute_seconds_total", model="pets.big") == pytest.approx(0.058)
    assert value(metrics, "ensemble_request_duration_seconds_bucket", model="pets", le="0.01") == 1
    assert value(metrics, "ensemble_request_duration_seconds_count", model="pets") == 2
    assert value(metrics, "ensemble_request_duration_seconds_sum", model="pets") == pytest.approx(0.02)
    assert value(metrics, "ensemble_request_duration_seconds_count", model="pets.big") == 1
    assert 'ensemble_request_duration_seconds_count{model="pets.small"' not in exposition(metrics)
    assert value(metrics, "ensemble_member_missing_total", model="pets.small") == 1
    assert value(metrics, "ensemble_member_missing_total", model="pets.big") == 0
    assert value(metrics, "ensemble_member_live_instances", model="pets.small") == 2
    assert value(metrics, "ensemble_quorum_answers_total") == 1
    assert value(metrics, "ensemble_combine_seconds_total") == pytest.approx(0.00001)
    assert value(metrics, "ensemble_combined_rows_total") == 4
    assert value(metrics, "ensemble_store_rows") == 5
    assert value(metrics, "ensemble_store_bytes") == 640
    assert value(metrics, "ensemble_store_capacity_bytes") == 1024


def test_every_family_has_help_and_a_type_and_histograms_are_whole() -> None:
    found = families(metrics_of_some_traffic())
    assert {"counter", "gauge", "histogram"} == {family.type for family in found.values()}
    for family in found.values():
        assert family.documentation
        assert family.samples
        names = {sample.name for sample in family.samples}
        if family.type == "histogram":
            assert names == {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}


def test_label_values_are_escaped() -> None:
    metrics = Metrics([Model('we"ird\\\n', "1", (), (), {})], GAUGES)
    assert value(metrics, "nv_inference_count", model='we"ird\\\n') == 0


def test_a_histogram_puts_a_bound_into_its_own_bucket() -> None:
    histogram = Histogram((1, 2))
    for number in (0.5, 1, 1.5, 2, 3):
        histogram.add(number)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 8


def test_a_new_plan_goes_on_counting_by_name_and_version_while_the_old_one_finishes() -> None:
    old = metrics_of_some_traffic()
    new = Metrics(models("big", "fresh"), GAUGES, previous=old)
    old.batch_done(1, rows=1, queue_s=0.0, compute_s=0.001)
    old.batch_done(0, rows=1, queue_s=0.0, compute_s=0.001)
    new.batch_done(0, rows=10, queue_s=0.0, compute_s=0.001)
    assert [counters.rows for counters in new.models] == [4, 79, 0]
    old.answered_by_quorum(missing=(1,))
    assert value(new, "ensemble_quorum_answers_total") == 2
    assert value(new, "ensemble_member_missing_total", model="pets.big") == 1
    newest = Metrics(models("big", version="2"), GAUGES, previous=new)
    assert [counters.rows for counters in newest.models] == [4, 0]


def test_statistics_have_the_fields_that_tritons_tools_read() -> None:
    metrics = metrics_of_some_traffic()
    assert model_statistics(metrics, 2) == {
        "name": "pets.big",
        "version": "1",
        "last_inference": 1700000000250,
        "inference_count": 68,
        "execution_count": 2,
        "inference_stats": {
            "success": {"count": 4, "ns": 75_000_000},
            "fail": {"count": 0, "ns": 0},
            "queue": {"count": 4, "ns": 1_000_000},
            "compute_input": {"count": 4, "ns": 0},
            "compute_infer": {"count": 4, "ns": 74_000_000},
            "compute_output": {"count": 4, "ns": 0},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": {"count": 1, "ns": 0},
                "compute_infer": {"count": 1, "ns": ns},
                "compute_output": {"count": 1, "ns": 0},
            }
            for rows, ns in ((4, 8_000_000), (64, 50_000_000))
        ],
    }
    ensemble = model_statistics(metrics, ENSEMBLE)
    assert ensemble["inference_count"] == 4
    assert ensemble["inference_stats"]["success"] == {"count": 2, "ns": 20_000_000}
    assert ensemble["inference_stats"]["fail"] == {"count": 2, "ns": 500_000_000}
    assert ensemble["inference_stats"]["compute_output"] == {"count": 2, "ns": 10_000}


def test_before_any_request_all_is_zero() -> None:
    statistics = model_statistics(Metrics(models("small"), GAUGES), 1)
    assert statistics["last_inference"] == 0
    assert statistics["batch_stats"] == []
    assert statistics["inference_stats"]["success"] == {"count": 0, "ns": 0}
