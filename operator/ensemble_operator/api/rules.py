"""What fields must be to each other: each rule in CEL, for the API server, and in Python, for the parser. Pure."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import urlsplit

from ensemble_contract.plan import INTEGER_RULES, WEIGHTED_RULES
from ensemble_contract.tensors import FLOATING, MAX_ROW_BYTES, NUMPY_DTYPES
from ensemble_operator.api.schema import INVALID, Place, Text, show
from ensemble_operator.api.structure import Checked, Rule

SUFFIX_FORMATS = {".pt2": "torch-export", ".pt": "torchscript", ".ts": "torchscript", ".onnx": "onnx"}
MEMBER_NAME = Text(
    63,
    1,
    r"[a-z0-9]([-a-z0-9]*[a-z0-9])?",
    "a DNS-1123 label (lower-case letters, digits and -, not at the ends)",
)
URI_PATTERN = r"(file:|(pvc|https?|s3|gs|hf)://)[!-~]+"
URI_EXPECTATION = "a URI like file:///PATH, pvc://CLAIM/PATH, https://…, s3://…, gs://… or hf://…"


def format_of(uri: str) -> str | None:
    """The model format that a URI's suffix tells; a query is not part of the suffix."""
    path = re.split(r"[?#]", uri, maxsplit=1)[0]
    return SUFFIX_FORMATS.get(posixpath.splitext(path)[1].lower())


def refuse_uri(uri: str) -> str | None:
    """What is wrong with a URI of a known scheme, or None."""
    scheme, _, rest = uri.partition(":")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        return f"must be {URI_EXPECTATION}, got {show(uri)}: {error}"
    if parts.username is not None or parts.password is not None:
        return "must not hold a user name or password: put them into a Secret and name it in credentialsSecret"
    if scheme == "file" and parts.netloc not in ("", "localhost"):
        return f"must not name a host; write file:///{rest.lstrip('/')}"
    if scheme != "file" and not (parts.netloc and parts.path.strip("/")):
        return f"must name {'a claim' if scheme == 'pvc' else 'a host or bucket'} and a path there, got {show(uri)}"
    if scheme == "pvc" and ".." in parts.path.split("/"):
        return f"must stay inside its claim, without '..', got {show(uri)}"
    if scheme == "pvc" and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", parts.netloc):
        return f"must name a claim by a DNS-1123 name, got {show(parts.netloc)}"
    return None


def _check_format(member: Checked, at: Place) -> None:
    model = member["model"]
    if member["format"] is None and "uri" in model and format_of(model["uri"]) is None:
        suffixes = ", ".join(SUFFIX_FORMATS)
        at.key("format").report(f"is required: {show(model['uri'])} does not end in {suffixes}, which would tell it")


FORMAT_KNOWN = Rule(
    r"has(self.format) || self.model.uri.matches('[.]([pP][tT]2?|[tT][sS]|[oO][nN][nN][xX])([?#].*)?$')",
    "format is required: the suffix of model.uri does not tell it",
    ("model", "format"),
    _check_format,
)


def _row_bytes(tensor: Checked) -> int:
    dtype = NUMPY_DTYPES[tensor["datatype"]]
    return math.prod(tensor["shape"]) * dtype.itemsize


def _check_row(tensor: Checked, at: Place) -> None:
    shape = tensor["shape"]
    if INVALID not in shape and _row_bytes(tensor) > MAX_ROW_BYTES:
        at.key("shape").report(f"must make rows of at most {MAX_ROW_BYTES} bytes, got {show(_row_bytes(tensor))}")


ROW_FITS = Rule("", "", ("shape", "datatype"), _check_row)


def _check_labels(output: Checked, at: Place) -> None:
    labels, shape = output["labels"], output["shape"]
    if isinstance(labels, list) and shape[-1:] != [len(labels)] and INVALID not in shape:
        classes = f"its last axis has {shape[-1]}" if shape else "it has no axis"
        at.key("labels").report(f"must have one name for each class of the output ({classes}), got {len(labels)}")


LABEL_PER_CLASS = Rule("", "", ("shape", "labels"), _check_labels)


def _check_min_max(bounds: Checked, at: Place) -> None:
    if bounds["min"] > bounds["max"]:
        at.key("min").report(f"must not be above max ({bounds['max']}), got {bounds['min']}")


MIN_NOT_ABOVE_MAX = Rule("self.min <= self.max", "min must not be above max", ("min", "max"), _check_min_max)


def _check_sizes(batching: Checked, at: Place) -> None:
    sizes = batching["sizes"]
    for index, (before, size) in enumerate(pairwise(sizes), start=1):
        if isinstance(before, int) and isinstance(size, int) and size <= before:
            at.key("sizes").item(index).must(f"above the size before it ({before})", size)


SIZES_INCREASE = Rule(
    "self.sizes.isSorted() && self.sizes.all(a, self.sizes.exists_one(b, b == a))",
    "sizes must be increasing",
    ("sizes",),
    _check_sizes,
)


def _check_target(planning: Checked, at: Place) -> None:
    if planning["objective"] == "devices" and not planning["targetThroughput"]:
        at.key("targetThroughput").report("must be above 0 with objective devices: it is what the devices shall reach")


DEVICES_NEED_TARGET = Rule(
    "self.objective != 'devices' || self.targetThroughput > 0.0",
    "objective devices needs targetThroughput above 0",
    ("objective", "targetThroughput"),
    _check_target,
)


def _check_quorum(spec: Checked, at: Place) -> None:
    quorum, members = spec["combine"].get("quorum"), len(spec["members"])
    if isinstance(quorum, int) and quorum > members:
        at.key("combine").key("quorum").must(f"1 to {members}, the number of members", quorum)


QUORUM_WITHIN_MEMBERS = Rule(
    "!has(self.combine.quorum) || self.combine.quorum <= size(self.members)",
    "combine.quorum must not be above the number of members",
    ("combine", "members"),
    _check_quorum,
)


def _check_weights(spec: Checked, at: Place) -> None:
    rule = spec["combine"].get("rule")
    if rule is None or rule in WEIGHTED_RULES:
        return
    for index, member in enumerate(spec["members"]):
        weight = member.get("weight", 1.0) if isinstance(member, dict) else 1.0
        if weight != 1.0:
            place = at.key("members").item(index).key("weight")
            place.report(
                f"must be 1 under the rule {rule}, got {weight:g}; weights count under weightedMean and weightedVote"
            )


WEIGHTS_NEED_WEIGHTED_RULE = Rule(
    "self.combine.rule in ['weightedMean', 'weightedVote'] || self.members.all(m, m.weight == 1.0)",
    "a weight other than 1 needs the rule weightedMean or weightedVote",
    ("combine", "members"),
    _check_weights,
)


def _check_count(spec: Checked, at: Place) -> None:
    if spec["autoscaling"] is not None and spec["devices"].get("count") is not None:
        at.key("devices").key("count").report("cannot be combined with spec.autoscaling: remove one of the two")


COUNT_OR_AUTOSCALING = Rule(
    "has(self.devices.count) != has(self.autoscaling)",
    "exactly one of devices.count and autoscaling is needed",
    ("devices", "autoscaling"),
    _check_count,
)


def _tensors(spec: Checked, key: str) -> Iterator[Checked]:
    """The tensors of `key` whose row is known."""
    for tensor in spec[key] or []:
        if isinstance(tensor, dict) and {"datatype", "shape"} <= tensor.keys() and INVALID not in tensor["shape"]:
            yield tensor


def _check_integers(spec: Checked, at: Place) -> None:
    rule = spec["combine"].get("rule")
    if rule is None or rule in INTEGER_RULES:
        return
    for output in _tensors(spec, "output"):
        if output["datatype"] not in FLOATING:
            name = show(output.get("name"))
            message = f"the rule {rule} needs floating outputs, and {name} is {output['datatype']}; "
            at.key("combine").key("rule").report(message + f"integers combine under {', '.join(sorted(INTEGER_RULES))}")


INTEGERS_NEED_THEIR_RULE = Rule("", "", ("combine", "output"), _check_integers)


def _check_store(spec: Checked, at: Place) -> None:
    store = spec["batching"].get("maxQueueBytes")
    row = sum(_row_bytes(tensor) for tensor in _tensors(spec, "input"))
    if isinstance(store, int) and row > store:
        at.key("batching").key("maxQueueBytes").report(
            f"must hold a row, which has {row} bytes of input, got {store} bytes"
        )


STORE_HOLDS_A_ROW = Rule("", "", ("batching", "input"), _check_store)
