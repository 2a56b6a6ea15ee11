"""The Grafana dashboard of the chart, as JSON: one tuple a panel. Pure."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 24
PANEL_WIDTH, PANEL_HEIGHT = 8, 7
_AT = '{namespace=~"$namespace"}'
_SEEN = '{namespace=~"$namespace",model=~"$model"}'
# Two namespaces may each have an ensemble of the same name.
_MODEL = "{{namespace}}/{{model}}"
_DURATIONS = f"rate(ensemble_request_duration_seconds_bucket{_SEEN}[5m])"
_BATCHES = f"sum by (namespace, model) (rate(ensemble_batch_rows_count{_SEEN}[5m]))"

# Title, unit, and (expression, legend) of each curve.
Panel = tuple[str, str, tuple[tuple[str, str], ...]]
PANELS: tuple[Panel, ...] = (
    ("Rows per second", "short", ((f"sum by (namespace, model) (rate(nv_inference_count{_SEEN}[1m]))", _MODEL),)),
    (
        "Requests by outcome",
        "reqps",
        (
            (f"sum by (namespace, model) (rate(nv_inference_request_success{_SEEN}[1m]))", f"{_MODEL} answered"),
            (
                f"sum by (namespace, model, reason) (rate(nv_inference_request_failure{_SEEN}[1m])) > 0",
                f"{_MODEL} {{{{reason}}}}",
            ),
        ),
    ),
    (
        "Latency of requests",
        "s",
        tuple(
            (
                f"histogram_quantile({share}, sum by (namespace, model, le) ({_DURATIONS}))",
                f"{_MODEL} {name}",
            )
            for share, name in ((0.5, "p50"), (0.99, "p99"))
        ),
    ),
    ("Live instances", "short", ((f"min by (namespace, model) (ensemble_member_live_instances{_SEEN})", _MODEL),)),
    (
        "Rows in a batch (mean)",
        "short",
        (
            (
                f"sum by (namespace, model) (rate(ensemble_batch_rows_sum{_SEEN}[5m])) / {_BATCHES}",
                _MODEL,
            ),
        ),
    ),
    (
        "Time of a batch (mean)",
        "s",
        (
            (
                f"sum by (namespace, model) (rate(ensemble_batch_compute_seconds_total{_SEEN}[5m])) / {_BATCHES}",
                _MODEL,
            ),
        ),
    ),
    (
        "Answers without a member",
        "reqps",
        (
            (f"sum by (namespace, model) (rate(ensemble_member_missing_total{_SEEN}[5m]))", f"without {_MODEL}"),
            (
                f"sum by (namespace, pod) (rate(ensemble_quorum_answers_total{_AT}[5m]))",
                "by quorum, {{namespace}}/{{pod}}",
            ),
        ),
    ),
    (
        "Row store in use",
        "percentunit",
        ((f"ensemble_store_bytes{_AT} / ensemble_store_capacity_bytes{_AT}", "{{namespace}}/{{pod}}"),),
    ),
    (
        "Requests that wait",
        "short",
        ((f"sum by (namespace, model) (nv_inference_pending_request_count{_SEEN})", _MODEL),),
    ),
    ("Ensembles by phase", "short", (("sum by (phase) (ensemble_operator_ensembles)", "{{phase}}"),)),
    ("Devices", "short", (("sum by (state) (ensemble_operator_devices)", "{{state}}"),)),
    (
        "Reconciles",
        "ops",
        (
            ("sum by (result) (rate(ensemble_operator_reconciles_total[5m]))", "{{result}}"),
            ("sum by (reason) (rate(ensemble_operator_reconcile_failures_total[5m]))", "failed: {{reason}}"),
        ),
    ),
)


def dashboard() -> str:
    """The dashboard, as Grafana imports it."""
    document: dict[str, Any] = {
        "title": "Ensembles",
        "uid": "ensemble-operator",
        "tags": ["ensemble-operator"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_source(), _choice("namespace", ""), _choice("model", 'namespace=~"$namespace"')]},
        "panels": [_panel(index, panel) for index, panel in enumerate(PANELS)],
    }
    return json.dumps(document, indent=1) + "\n"


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _choice(label: str, among: str) -> dict[str, Any]:
    query = f"label_values(nv_inference_count{{{among}}}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    title, unit, curves = panel
    in_row = WIDTH // PANEL_WIDTH
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {
            "x": index % in_row * PANEL_WIDTH,
            "y": index // in_row * PANEL_HEIGHT,
            "w": PANEL_WIDTH,
            "h": PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + curve), "expr": expression, "legendFormat": legend, "datasource": source}
            for curve, (expression, legend) in enumerate(curves)
        ],
    }
