"""The metrics page: valid for Prometheus' own parser, all that is promised, escaped, and true."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ensemble_operator.control.metrics import NAMES, Instruments, Sources


def page(instruments: Instruments, ensembles: Iterable[dict[str, Any]] = ()) -> str:
    return instruments.exposition(
        Sources(
            requests=lambda: {("get", "secrets", 200): 3, ("list", "nodes", 0): 1},
            relists=lambda: {"pods": 2},
            ensembles=lambda: ensembles,
            queue_depth=lambda: 4,
            queue_oldest_s=lambda: 0.5,
            leads=lambda: True,
        )
    )


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_promised_is_there_with_its_type() -> None:
    families = {family.name: family for family in text_string_to_metric_families(page(Instruments(0)))}
    for name, (kind, explanation) in NAMES.items():
        family = families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, explanation)


def test_reconciles_are_counted_and_timed() -> None:
    instruments = Instruments(0)
    instruments.reconciled("done", 0.003)
    instruments.reconciled("done", 0.005)
    instruments.reconciled("failed", 40, "Forbidden")
    found = values(page(instruments))
    p = "ensemble_operator"
    assert found[f"{p}_reconciles_total", (("result", "done"),)] == 2
    assert found[f"{p}_reconcile_failures_total", (("reason", "Forbidden"),)] == 1
    assert found[f"{p}_reconcile_duration_seconds_bucket", (("le", "0.005"),)] == 2
    assert found[f"{p}_reconcile_duration_seconds_bucket", (("le", "30.0"),)] == 2
    assert found[f"{p}_reconcile_duration_seconds_bucket", (("le", "+Inf"),)] == 3
    assert found[f"{p}_reconcile_duration_seconds_count", ()] == 3


def test_ensembles_and_devices_come_from_the_resources() -> None:
    instruments = Instruments(0)
    ready = {"status": {"phase": "Ready", "devices": {"wanted": 4, "held": 3}}}
    found = values(page(instruments, [ready, ready, {}, {"status": {"phase": 'a"\\\nb'}}]))
    p = "ensemble_operator"
    assert found[f"{p}_ensembles", (("phase", "Ready"),)] == 2
    assert found[f"{p}_ensembles", (("phase", "Unknown"),)] == 1
    assert found[f"{p}_ensembles", (("phase", 'a"\\\nb'),)] == 1
    assert found[f"{p}_devices", (("state", "held"),)] == 6
    assert (f"{p}_devices", (("state", "free"),)) not in found
    instruments.free_devices(5)
    assert values(page(instruments))[f"{p}_devices", (("state", "free"),)] == 5


def test_requests_by_verb_resource_and_code() -> None:
    found = values(page(Instruments(0)))
    labels = (("code", "0"), ("resource", "nodes"), ("verb", "list"))
    assert found["ensemble_operator_api_requests_total", labels] == 1
    assert found["process_resident_memory_bytes", ()] > 1 << 20
