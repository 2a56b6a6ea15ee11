"""The Prometheus text format of the gateway's counters (Prometheus, Exposition formats, text format 0.0.4).

`nv_inference_*` have the names and the meaning of Triton's, so that its dashboards work; what it has no name for is
`ensemble_*`. Written by hand because `prometheus_client` appends `_total` to every counter, which Triton's names lack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ensemble_gateway.metrics import BATCH_BUCKETS_ROWS, ENSEMBLE, Histogram, Metrics, ModelCounters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Sample = tuple[str, str, float]


def exposition(metrics: Metrics) -> str:
    """All metrics as text, to be answered with CONTENT_TYPE."""
    return "".join(line for family in _families(metrics) for line in family)


def _families(metrics: Metrics) -> Iterator[Iterator[str]]:
    yield from _triton_families(metrics)
    yield from _member_families(metrics)
    yield from _gateway_families(metrics)


def _triton_families(metrics: Metrics) -> Iterator[Iterator[str]]:
    models = [(_labels(counters), counters) for counters in metrics.models]

    def family(name: str, text: str, values: Iterable[float]) -> Iterator[str]:
        samples = (("", labels, value) for (labels, _), value in zip(models, values, strict=True))
        return _family(f"nv_inference_{name}", "counter", text, samples)

    counters = metrics.models
    yield family(
        "request_success", "Requests answered; for a member, parts of requests run", (c.requests for c in counters)
    )
    yield _family(
        "nv_inference_request_failure",
        "counter",
        "Requests without an answer, by reason",
        (
            ("", f'{labels},reason="{reason}"', count)
            for labels, model in models
            for reason, count in model.failures.items()
        ),
    )
    yield family("count", "Rows inferred", (c.rows for c in counters))
    yield family("exec_count", "Batches run; for the ensemble, requests", (c.executions for c in counters))
    yield family(
        "request_duration_us",
        "Wall time of requests, summed; for a member, queue and compute",
        (_us(c.success_s) for c in counters),
    )
    yield family("queue_duration_us", "Time that requests waited, summed", (_us(c.queue_s) for c in counters))
    yield family(
        "compute_infer_duration_us",
        "Time in the model, summed over requests; a batch counts for each request in it",
        (_us(c.compute_s) for c in counters),
    )
    yield _family(
        "nv_inference_pending_request_count",
        "gauge",
        "Requests that wait to be run",
        (("", labels, metrics.gauges.pending_requests(index)) for index, (labels, _) in enumerate(models)),
    )


def _member_families(metrics: Metrics) -> Iterator[Iterator[str]]:
    members = [(_labels(counters), counters) for counters in metrics.models[ENSEMBLE + 1 :]]
    yield _family(
        "ensemble_batch_rows",
        "histogram",
        "Rows of a batch that a member ran",
        (sample for labels, model in members for sample in _histogram(labels, _batch_sizes(model))),
    )
    yield _family(
        "ensemble_batch_compute_seconds_total",
        "counter",
        "Time that batches of a member took, each batch once",
        (("", labels, sum(size.compute_s for size in model.batches.values())) for labels, model in members),
    )
    yield _family(
        "ensemble_member_missing_total",
        "counter",
        "Requests answered by a quorum without this member",
        (("", labels, model.missing) for labels, model in members),
    )
    yield _family(
        "ensemble_member_live_instances",
        "gauge",
        "Instances of a member that workers report live",
        (("", labels, metrics.gauges.live_instances(index)) for index, (labels, _) in enumerate(members)),
    )


def _gateway_families(metrics: Metrics) -> Iterator[Iterator[str]]:
    # Most ensembles have many members that no client ever asks by name: thousands of zeros that nobody needs.
    asked = [model for index, model in enumerate(metrics.models) if index == ENSEMBLE or any(model.durations.counts)]
    yield _family(
        "ensemble_request_duration_seconds",
        "histogram",
        "Wall time of answered requests, by the model that the client named",
        (sample for model in asked for sample in _histogram(_labels(model), model.durations)),
    )
    gauges = metrics.gauges
    single: tuple[tuple[str, str, str, float], ...] = (
        ("quorum_answers_total", "counter", "Requests answered without all members", metrics.gateway.quorum_answers),
        ("combine_seconds_total", "counter", "Time spent in the combination rule", metrics.gateway.combine_s),
        ("combined_rows_total", "counter", "Rows combined", metrics.gateway.combined_rows),
        ("store_rows", "gauge", "Rows in the store", gauges.store_rows()),
        ("store_bytes", "gauge", "Bytes of inputs and kept outputs in the store", gauges.store_bytes()),
        ("store_capacity_bytes", "gauge", "Bytes that the store may hold", gauges.store_capacity_bytes()),
    )
    for name, kind, text, value in single:
        yield _family(f"ensemble_{name}", kind, text, (("", "", value),))


def _family(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for suffix, labels, value in samples:
        yield f"{name}{suffix}{{{labels}}} {value}\n" if labels else f"{name}{suffix} {value}\n"


def _histogram(labels: str, histogram: Histogram) -> Iterator[_Sample]:
    count = 0
    for bound, times in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        count += times
        yield "_bucket", f'{labels},le="{bound}"', count
    yield "_sum", labels, histogram.total
    yield "_count", labels, count


def _batch_sizes(model: ModelCounters) -> Histogram:
    histogram = Histogram(BATCH_BUCKETS_ROWS)
    for rows, size in model.batches.items():
        histogram.add(rows, size.executions)
    return histogram


def _labels(model: ModelCounters) -> str:
    return f'model="{_escaped(model.name)}",version="{_escaped(model.version)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
