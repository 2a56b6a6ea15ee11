"""The declaration of `status`: what the operator reports and never reads. Counts, and at most 64 rows of the matrix."""

from __future__ import annotations

from ensemble_operator.api.schema import Choice, Integer, Kind, Number, Text
from ensemble_operator.api.structure import ABSENT, Field, Group, Listing

MAX_ROWS = 64
MAX_INSTANCES = 64
_COUNT = Integer(0, (1 << 53) - 1)
_RATE = Number(0, 1e15)
_NAME = Text(253)


def _report(*fields: tuple[str, Kind, str]) -> Group:
    """A group without required fields: a report may always be partial."""
    return Group(tuple(Field(key, kind, description, ABSENT) for key, kind, description in fields), into=dict)


_CONDITION = Group(
    fields=(
        Field("type", Text(316, 1), "Accepted, DevicesAcquired, Profiled, Planned, Ready, Degraded or RolloutBlocked."),
        Field("status", Choice(("True", "False", "Unknown")), "Whether it holds."),
        Field("observedGeneration", _COUNT, "The generation of the resource that it was seen for.", ABSENT),
        Field("lastTransitionTime", Text(64), "When the status last changed (RFC 3339)."),
        Field("reason", Text(1024, 1), "One word for why."),
        Field("message", Text(32_768), "What is the case, and what to do."),
    ),
    into=dict,
)
_ROW = _report(
    ("worker", _NAME, "The worker that owns the device."),
    ("node", _NAME, "The node that it is on."),
    ("deviceClass", _NAME, "What kind of device it is."),
    ("usedBytes", _COUNT, "Memory that its instances use."),
    ("capacityBytes", _COUNT, "Memory that instances may use."),
    (
        "instances",
        Listing(
            _report(("member", _NAME, "The member."), ("batchSize", _COUNT, "Rows of its batches.")),
            max_items=MAX_INSTANCES,
        ),
        "What runs there.",
    ),
)
STATUS = _report(
    ("observedGeneration", _COUNT, "The generation of the resource that this status is about."),
    ("conditions", Listing(_CONDITION, max_items=32, keys=("type",)), "What holds and what does not."),
    ("phase", Text(64), "The conditions in one word."),
    ("replicas", _COUNT, "Workers that exist; the scale subresource's."),
    ("selector", Text(1024), "Selects the workers' pods; the scale subresource's."),
    (
        "devices",
        _report(
            ("wanted", _COUNT, "Devices asked for."),
            ("held", _COUNT, "Devices with a worker that answers."),
            ("summary", Text(64), "held/wanted"),
        ),
        "The devices.",
    ),
    (
        "allocation",
        _report(
            ("generation", _COUNT, "Generation of the plan."),
            ("instances", _COUNT, "Instances in the whole matrix."),
            ("omittedRows", _COUNT, "Rows of the matrix that are not listed here."),
            ("rows", Listing(_ROW, max_items=MAX_ROWS), "The allocation matrix, a device a row."),
        ),
        "The plan that runs.",
    ),
    (
        "throughput",
        _report(
            ("predicted", _RATE, "Rows/s that the model of the plan predicts."),
            ("measured", _RATE, "Rows/s seen under traffic."),
            ("bound", _RATE, "Rows/s that no plan on these devices can exceed."),
        ),
        "How fast the ensemble is.",
    ),
    (
        "members",
        _report(
            ("total", _COUNT, "Members of the ensemble."),
            ("live", _COUNT, "Members with an instance that answers."),
            ("summary", Text(64), "live/total"),
        ),
        "The members.",
    ),
    ("url", Text(2048), "Where the ensemble answers."),
)
