"""The declaration of `spec`: every field with its description, kind, bounds and default, once, for parser and CRD."""

from __future__ import annotations

from ensemble_contract.plan import ACTIVATIONS, FORMATS, MAX_BATCH_SIZE, MAX_MEMBERS, RULES
from ensemble_contract.tensors import MAX_RANK, NUMPY_DTYPES, TensorSpec
from ensemble_operator.api import rules
from ensemble_operator.api.assemble import (
    make_combine,
    make_measurement,
    make_member,
    make_model,
    make_profile,
    make_spec,
)
from ensemble_operator.api.ensemble import (
    Autoscaling,
    Batching,
    Gateway,
    Output,
    Planning,
    Transport,
)
from ensemble_operator.api.pods import CLUSTER, DEVICES, EXTRA_DEVICES, MAX_DEVICES, POD_TEMPLATE, SUBDOMAIN
from ensemble_operator.api.schema import Choice, Duration, Integer, Number, Quantity, Text
from ensemble_operator.api.structure import ABSENT, Field, Group, Listing, OneOrMany, TextOrTexts
from ensemble_operator.quantities import parse_bytes

_BATCH_SIZE = Integer(1, MAX_BATCH_SIZE)

_MODEL = Group(
    fields=(
        Field(
            "uri",
            Text(2048, 1, rules.URI_PATTERN, rules.URI_EXPECTATION, rules.refuse_uri),
            "Where the model file is: file:///PATH (inside the worker), pvc://CLAIM/PATH, http(s)://, s3://, gs:// or hf://.",
        ),
        Field("sha256", Text(64, 0, r"([0-9a-fA-F]{64})?", "a SHA-256 of 64 hex digits"), "Checked if given.", ""),
        Field(
            "version",
            Text(64, 1, r"[A-Za-z0-9._-]+", "a version (letters, digits, ., _ and -)"),
            "Shown to clients.",
            "1",
        ),
        Field(
            "credentialsSecret", SUBDOMAIN, "Secret of this namespace with the store's credentials.", "", scope=CLUSTER
        ),
    ),
    into=make_model,
)
_PROFILE = Group(
    fields=(
        Field(
            "measurements",
            Listing(
                Group(
                    fields=(
                        Field("deviceClass", Text(253, 1), "Class of device, as the status names it; *: any.", "*"),
                        Field("batchSize", _BATCH_SIZE, "Rows of a batch."),
                        Field(
                            "memory",
                            Quantity(parse_bytes, "0", "64Ti"),
                            "Bytes that an instance adds.",
                            name="memory_bytes",
                        ),
                        Field("latency", Duration("1us", "1h"), "Time of one batch.", name="latency_s"),
                    ),
                    into=make_measurement,
                ),
                max_items=64,
                min_items=1,
                keys=("deviceClass", "batchSize"),
            ),
            "One for each device class and batch size.",
        ),
    ),
    into=make_profile,
)
_MEMBER = Group(
    fields=(
        Field("name", rules.MEMBER_NAME, "Name; clients reach the member as ENSEMBLE.NAME."),
        Field("model", _MODEL, "The model file."),
        Field(
            "format",
            Choice(FORMATS),
            "Format of the file; by default its suffix says it (.pt2; .pt, .ts; .onnx).",
            ABSENT,
        ),
        Field("activation", Choice(ACTIVATIONS), "Applied to the member's outputs before they are combined.", "none"),
        Field("weight", Number(0, 1e6, exclusive=True), "Weight under the rules weightedMean and weightedVote.", 1.0),
        Field("profile", _PROFILE, "What the member costs, to skip measuring it.", ABSENT),
    ),
    into=make_member,
    rules=(rules.FORMAT_KNOWN,),
)

_TENSOR_FIELDS = (
    Field(
        "name",
        Text(256, 1, r"[!-~]+", "a name of printable ASCII without spaces"),
        "Name, as clients and models use it.",
    ),
    Field("datatype", Choice(tuple(NUMPY_DTYPES)), "Datatype of the Open Inference Protocol V2."),
    Field("shape", Listing(Integer(1, 1 << 31), MAX_RANK), "Shape of one row, without the batch."),
)
_LABELS = TextOrTexts(Text(2048, 1), Listing(Text(512), max_items=65_536, min_items=1))
_INPUT = OneOrMany(Listing(Group(_TENSOR_FIELDS, TensorSpec, (rules.ROW_FITS,)), 64, 1, keys=("name",)))
_LABELS_FIELD = Field(
    "labels", _LABELS, "Names of the classes: a list, or the path or URI of a file, a line each.", ABSENT
)
_OUTPUT = OneOrMany(
    Listing(
        Group(
            (*_TENSOR_FIELDS, _LABELS_FIELD),
            lambda labels, **tensor: Output(TensorSpec(**tensor), labels),
            (rules.ROW_FITS, rules.LABEL_PER_CLASS),
        ),
        max_items=64,
        min_items=1,
        keys=("name",),
    )
)

_COMBINE = Group(
    fields=(
        Field(
            "rule", Choice(RULES), "How the members' outputs become one answer; none: each is answered apart.", "mean"
        ),
        Field(
            "quorum", Integer(1, MAX_MEMBERS), "Members that must have answered by the deadline; default: all.", ABSENT
        ),
    ),
    into=make_combine,
)
_AUTOSCALING = Group(
    fields=(
        Field("min", Integer(1, MAX_DEVICES), "Fewest devices.", 1, "min_devices"),
        Field("max", Integer(1, MAX_DEVICES), "Most devices.", name="max_devices"),
        Field("targetUtilization", Number(0, 1, exclusive=True), "Share of the devices' time to keep busy.", 0.8),
    ),
    into=Autoscaling,
    rules=(rules.MIN_NOT_ABOVE_MAX,),
)
_BATCHING = Group(
    fields=(
        Field("sizes", Listing(_BATCH_SIZE, 32, 1), "Batch sizes to choose from, increasing.", [1, 8, 16, 32, 64, 128]),
        Field("maxDelay", Duration("0s", "1m"), "How long rows may wait for a fuller batch.", "0ms", "max_delay_s"),
        Field("maxQueueBytes", Quantity(parse_bytes, "1Mi", "16Ti"), "Size of the gateway's row store.", "512Mi"),
    ),
    into=Batching,
    rules=(rules.SIZES_INCREASE,),
)
_PLANNING = Group(
    fields=(
        Field(
            "objective",
            Choice(("throughput", "devices")),
            "Most throughput, or fewest devices.",
            "throughput",
        ),
        Field("targetThroughput", Number(0, 1e12), "Rows/s to reach with objective devices.", 0.0),
        Field("strategy", Choice(("greedy", "greedy-paper", "exact")), "How the plan is searched.", "greedy"),
        Field(
            "evaluate",
            Choice(("model", "live")),
            "Score candidates by the model, or by running them.",
            "model",
        ),
        Field("maxIterations", Integer(0, 10_000), "Steps of the search.", 10),
        Field("maxNeighbours", Integer(1, 100_000), "Candidates of a step.", 100),
        Field("seed", Integer(0, (1 << 31) - 1), "Of the search: same seed, same plan.", 0),
        Field(
            "profileBudget",
            Duration("1s", "24h"),
            "Time to spend measuring members, with `ensemble profile` also for loading them and for what serving and "
            "sharing devices cost. The smallest batch size of each member is measured in any case.",
            "5m",
            "profile_budget_s",
        ),
    ),
    into=Planning,
    rules=(rules.DEVICES_NEED_TARGET,),
)
_GATEWAY = Group(
    fields=(
        Field("replicas", Integer(1, 256), "Gateway pods.", 1, scope=CLUSTER),
        Field("timeout", Duration("1ms", "24h"), "Deadline of a request that brings none.", "30s", "timeout_s"),
        Field(
            "serviceType",
            Choice(("ClusterIP", "NodePort", "LoadBalancer")),
            "Type of the Service.",
            "ClusterIP",
            scope=CLUSTER,
        ),
    ),
    into=Gateway,
)
_TRANSPORT = Group(
    (Field("encryption", Choice(("curve", "none")), "Between gateways and workers: CURVE, or none.", "curve"),),
    into=Transport,
)

SPEC = Group(
    fields=(
        Field("members", Listing(_MEMBER, MAX_MEMBERS, 1, keys=("name",)), "The DNNs; each sees every input."),
        Field(
            "input",
            _INPUT,
            "The input, or a list of them; optional where the models tell. Immutable.",
            ABSENT,
            "inputs",
        ),
        Field(
            "output",
            _OUTPUT,
            "The output, or a list of them; optional where the models tell. Immutable.",
            ABSENT,
            "outputs",
        ),
        Field("combine", _COMBINE, "The combination rule.", {}),
        Field("devices", DEVICES, "The devices to hold: count, unless autoscaling says it.", {}),
        Field("extraDevices", EXTRA_DEVICES, "Further pools of devices; never scaled.", [], scope=CLUSTER),
        Field(
            "autoscaling",
            _AUTOSCALING,
            "Bounds to scale devices within by load, instead of devices.count.",
            ABSENT,
            scope=CLUSTER,
        ),
        Field("batching", _BATCHING, "How rows become batches.", {}),
        Field("planning", _PLANNING, "How members are placed on devices.", {}),
        Field("gateway", _GATEWAY, "The gateway.", {}),
        Field("transport", _TRANSPORT, "The link between gateways and workers.", {}, scope=CLUSTER),
        Field(
            "rollout",
            Choice(("Online", "Pause")),
            "Pause: requests may be held while members are swapped.",
            "Online",
        ),
        Field(
            "podTemplate",
            POD_TEMPLATE,
            "Changes to the pods; needs the operator's setting allowOverrides.",
            {},
            scope=CLUSTER,
        ),
    ),
    into=make_spec,
    rules=(
        rules.QUORUM_WITHIN_MEMBERS,
        rules.WEIGHTS_NEED_WEIGHTED_RULE,
        rules.COUNT_OR_AUTOSCALING,
        rules.INTEGERS_NEED_THEIR_RULE,
        rules.STORE_HOLDS_A_ROW,
    ),
)
