"""The V2 statistics extension: a model's counters as Triton's clients and `perf_analyzer` read them. Pure."""

from __future__ import annotations

from typing import Any

from ensemble_gateway.metrics import ENSEMBLE, Metrics, ModelCounters


def model_statistics(metrics: Metrics, model_index: int) -> dict[str, Any]:
    """One entry of `model_stats`. Times are in ns, `last_inference` in ms since the epoch (0: none yet).

    The ensemble computes nothing itself: its `compute_output` is the combination, and what its members spent is in
    theirs. Inputs go to a device inside `compute_infer`; there is no response cache.
    """
    counters = metrics.models[model_index]
    combine_s = metrics.gateway.combine_s if model_index == ENSEMBLE else 0.0
    requests = counters.requests
    return {
        "name": counters.name,
        "version": counters.version,
        "last_inference": round(counters.last_inference_s * 1e3),
        "inference_count": counters.rows,
        "execution_count": counters.executions,
        "inference_stats": {
            "success": _duration(requests, counters.success_s),
            "fail": _duration(sum(counters.failures.values()), counters.failed_s),
            "queue": _duration(requests, counters.queue_s),
            "compute_input": _duration(requests, 0.0),
            "compute_infer": _duration(requests, counters.compute_s),
            "compute_output": _duration(requests, combine_s),
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": _batches(counters),
    }


def _batches(counters: ModelCounters) -> list[dict[str, Any]]:
    return [
        {
            "batch_size": rows,
            "compute_input": _duration(size.executions, 0.0),
            "compute_infer": _duration(size.executions, size.compute_s),
            "compute_output": _duration(size.executions, 0.0),
        }
        for rows, size in sorted(counters.batches.items())
    ]


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}
