"""What a load came to, for people and for programs. Pure."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from ensemble_operator.load.bench import Bench
from ensemble_operator.load.loads import Load

# From here on the generator, not the server, may be what limits.
BUSY_GENERATOR = 0.8


def headline(bench: Bench) -> str:
    """What was asked of whom."""
    return f"{bench.target.url}: {_describe(bench.load)}"


def _describe(load: Load) -> str:
    """A load in words."""
    rows = "1 row" if load.rows == 1 else f"{load.rows:,} rows"
    if load.rate_per_s:
        return f"{load.rate_per_s:,g} requests/s of {rows} ({load.arrivals}), for {load.duration_s:g} s"
    return f"{load.clients:,} clients, {rows} a request, for {load.duration_s:g} s"


def bench_table(bench: Bench) -> Table:
    """Predicted against measured, then latencies and failures."""
    result = bench.result
    predicted = bench.prediction.rows_per_s if bench.prediction else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ("measured",) if predicted is None else ("predicted", "measured", "of it")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, figure: str, promised: str = "", share: str = "") -> None:
        table.add_row(name, *((figure,) if predicted is None else (promised, figure, share)))

    if predicted is None:
        add("rows/s", f"{result.rows_per_s:,.1f}")
    else:
        add("rows/s", f"{result.rows_per_s:,.1f}", f"{predicted:,.1f}", f"{result.rows_per_s / predicted:.0%}")
    add("requests/s", f"{result.requests_per_s:,.1f}")
    for name, figure in (
        ("p50", result.p50_ms),
        ("p90", result.p90_ms),
        ("p99", result.p99_ms),
        ("longest", result.max_ms),
    ):
        add(f"{name} ms", f"{figure:,.2f}")
    add("answered", f"{result.requests:,}")
    add("failed", f"{sum(result.failures.values()):,}")
    if result.partial:
        add("lacking members", f"{result.partial:,}")
    return table


def remarks(bench: Bench) -> list[str]:
    """Failures by reason, and what makes the figures say less than they seem to."""
    result, load = bench.result, bench.load
    lines = [f"{count:,} requests failed: {reason}" for reason, count in result.failures.items()]
    if result.example:
        lines.append(f"the first said: {result.example}")
    if result.cpu_share >= BUSY_GENERATOR:
        lines.append(f"the load generator used {result.cpu_share:.0%} of a core: it may be what limits, not the server")
    under_way = load.clients * load.rows
    if bench.prediction and not load.rate_per_s and under_way < bench.prediction.batch_rows:
        wanted = bench.prediction.batch_rows
        lines.append(
            f"{under_way:,} rows under way at most, and full batches take {wanted:,}: more --clients or --rows "
            "come closer"
        )
    return lines


def bench_document(bench: Bench) -> dict[str, Any]:
    """The same as JSON's types."""
    load, result = bench.load, bench.result
    document: dict[str, Any] = {
        "model": bench.target.model,
        "url": bench.target.url,
        "load": {
            "clients": load.clients,
            "rows": load.rows,
            "ratePerS": load.rate_per_s or None,
            "arrivals": load.arrivals if load.rate_per_s else None,
            "warmupS": load.warmup_s,
            "durationS": load.duration_s,
            "seed": load.seed,
        },
        "requests": result.requests,
        "rowsPerS": result.rows_per_s,
        "requestsPerS": result.requests_per_s,
        "latencyMs": {
            "mean": result.mean_ms,
            "p50": result.p50_ms,
            "p90": result.p90_ms,
            "p99": result.p99_ms,
            "max": result.max_ms,
        },
        "failures": result.failures,
        "partial": result.partial,
        "generatorCpuShare": result.cpu_share,
    }
    if result.example:
        document["firstFailure"] = result.example
    if bench.prediction is not None:
        document["predictedRowsPerS"] = bench.prediction.rows_per_s
    return document
