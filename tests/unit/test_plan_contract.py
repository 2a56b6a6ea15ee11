"""Plans cross process borders: what a worker or gateway accepts, and what it says about the rest."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_contract.errors import InvalidPlan, PlanTooLarge
from ensemble_contract.plan import (
    MAX_PLAN_BYTES,
    EnsemblePlan,
    GatewayPlan,
    Instance,
    ModelSource,
    ServedMember,
    WorkerAddress,
    WorkerPlan,
    decode_plan,
    encode_plan,
    source_of,
)
from ensemble_contract.tensors import TensorSpec

IMAGE, CLASSES = TensorSpec("image", "FP32", (3, 32, 32)), TensorSpec("y", "FP32", (10,))
WORKER = WorkerPlan(
    generation=3,
    ensemble="pets",
    worker="cpu-0",
    inputs=(IMAGE,),
    outputs=(CLASSES,),
    members=(ModelSource("small", "d1", "file:///m/small.pt2", "torch-export", "softmax", "ab" * 32, "2"),),
    instances=(Instance("small", 8),),
    row_cache_bytes=1 << 20,
)
GATEWAY = GatewayPlan(
    generation=3,
    ensemble="pets",
    inputs=(IMAGE,),
    outputs=(CLASSES,),
    members=(ServedMember("small", "d1"), ServedMember("big", "d2", "7", 2.0, "onnx", "sigmoid")),
    workers=(WorkerAddress("cpu-0", "unix:/run/e/cpu-0.sock"), WorkerAddress("gpu-1", "tcp://w-1.pets.svc:5555")),
    rule="weightedMean",
    quorum=1,
    labels={"y": ("cat", "dog")},
)
GOLDEN_WORKER = (
    '{"generation":3,"ensemble":"pets","worker":"cpu-0",'
    '"inputs":[{"name":"image","datatype":"FP32","shape":[3,32,32]}],'
    '"outputs":[{"name":"y","datatype":"FP32","shape":[10]}],'
    '"members":[{"name":"small","digest":"d1","uri":"file:///m/small.pt2","format":"torch-export",'
    f'"activation":"softmax","sha256":"{"ab" * 32}","version":"2"}}],'
    '"instances":[{"member":"small","batchSize":8,"digest":""}],"rowCacheBytes":1048576}'
)
GOLDEN_GATEWAY = (
    '{"generation":3,"ensemble":"pets",'
    '"inputs":[{"name":"image","datatype":"FP32","shape":[3,32,32]}],'
    '"outputs":[{"name":"y","datatype":"FP32","shape":[10]}],'
    '"members":[{"name":"small","digest":"d1","version":"1","weight":1.0,"format":"torch-export","activation":"none"},'
    '{"name":"big","digest":"d2","version":"7","weight":2.0,"format":"onnx","activation":"sigmoid"}],'
    '"workers":[{"name":"cpu-0","address":"unix:/run/e/cpu-0.sock"},'
    '{"name":"gpu-1","address":"tcp://w-1.pets.svc:5555"}],'
    '"rule":"weightedMean","quorum":1,"labels":{"y":["cat","dog"]},'
    '"timeoutS":30.0,"maxDelayS":0.0,"maxQueueBytes":536870912,"version":"1","hold":false}'
)
SMALL, BIG = (
    ModelSource("small", "d1", "file:///m/small.pt2", "torch-export"),
    ModelSource("big", "d2", "hf://m/big.onnx", "onnx", "sigmoid"),
)
# One version of a member replaces another on `gpu-1`, and its batch size changes on `cpu-0`.
NEWER = msgspec.structs.replace(SMALL, digest="d3")
ENSEMBLE = EnsemblePlan(GATEWAY, (SMALL, BIG, NEWER), {"cpu-0": ((0, 8), (0, 16)), "gpu-1": ((1, 4), (0, 8), (2, 8))})
GOLDEN_ENSEMBLE = (
    f'{{"gateway":{GOLDEN_GATEWAY},"sources":['
    '{"name":"small","digest":"d1","uri":"file:///m/small.pt2","format":"torch-export",'
    '"activation":"none","sha256":"","version":"1"},'
    '{"name":"big","digest":"d2","uri":"hf://m/big.onnx","format":"onnx",'
    '"activation":"sigmoid","sha256":"","version":"1"},'
    '{"name":"small","digest":"d3","uri":"file:///m/small.pt2","format":"torch-export",'
    '"activation":"none","sha256":"","version":"1"}],'
    '"rows":{"cpu-0":[[0,8],[0,16]],"gpu-1":[[1,4],[0,8],[2,8]]},"rowCacheBytes":268435456}'
)
FORMS: tuple[Any, ...] = (WorkerPlan, GatewayPlan, EnsemblePlan)
GOLDEN = (GOLDEN_WORKER, GOLDEN_GATEWAY, GOLDEN_ENSEMBLE)


def test_golden_json() -> None:
    assert encode_plan(WORKER).decode() == GOLDEN_WORKER
    assert encode_plan(GATEWAY).decode() == GOLDEN_GATEWAY
    assert encode_plan(ENSEMBLE).decode() == GOLDEN_ENSEMBLE


def test_round_trip() -> None:
    assert decode_plan(GOLDEN_WORKER.encode(), WorkerPlan) == WORKER
    assert decode_plan(GOLDEN_GATEWAY.encode(), GatewayPlan) == GATEWAY
    assert decode_plan(GOLDEN_ENSEMBLE.encode(), EnsemblePlan) == ENSEMBLE


def test_a_worker_finds_its_row_in_the_mirror() -> None:
    row = ENSEMBLE.worker("gpu-1")
    assert row == WorkerPlan(
        3, "pets", "gpu-1", (IMAGE,), (CLASSES,), (BIG, SMALL, NEWER),
        (Instance("big", 4, "d2"), Instance("small", 8, "d1"), Instance("small", 8, "d3")),
    )  # fmt: skip
    assert [source_of(row.members, instance).digest for instance in row.instances] == ["d2", "d1", "d3"]
    assert ENSEMBLE.worker("cpu-0") == WorkerPlan(
        3, "pets", "cpu-0", (IMAGE,), (CLASSES,), (SMALL,), (Instance("small", 8, "d1"), Instance("small", 16, "d1")),
    )  # fmt: skip
    assert ENSEMBLE.worker("cpu-7") is None
    nothing = ENSEMBLE.row("cpu-7")
    assert (nothing.generation, nothing.worker, nothing.members, nothing.instances) == (3, "cpu-7", (), ())


def test_an_instance_says_which_version_where_there_are_two() -> None:
    versions = (SMALL, NEWER)
    with pytest.raises(InvalidPlan, match="2 versions of 'small' are listed: a digest is needed"):
        msgspec.structs.replace(WORKER, members=versions)
    with pytest.raises(InvalidPlan, match="member 'small' d9 is not listed"):
        msgspec.structs.replace(WORKER, members=versions, instances=(Instance("small", 8, "d9"),))
    with pytest.raises(InvalidPlan, match="placed twice"):
        msgspec.structs.replace(WORKER, instances=(Instance("small", 8, "d1"), Instance("small", 8)))
    both = msgspec.structs.replace(
        WORKER, members=versions, instances=(Instance("small", 8, "d1"), Instance("small", 8, "d3"))
    )
    assert [source_of(both.members, one) for one in both.instances] == [SMALL, NEWER]


def test_fields_of_a_later_version_are_passed_over() -> None:
    later = json.loads(GOLDEN_WORKER) | {"colour": "blue"}
    assert decode_plan(json.dumps(later).encode(), WorkerPlan) == WORKER


def changed(golden: str, path: str, value: Any) -> bytes:
    """The plan with one field replaced, by its path: `members.0.format`."""
    plan = json.loads(golden)
    at = plan
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in parents:
        at = at[key]
    at[last] = value
    return json.dumps(plan).encode()


BAD_WORKER = [
    ("generation", -1, "generation: -1 is not in 0"),
    ("generation", 1 << 63, "generation"),
    ("generation", "3", r"Expected `int`, got `str` - at `\$.generation`"),
    ("inputs", [], "inputs: at least one"),
    ("outputs", [{"name": "y", "datatype": "FP32", "shape": [1]}] * 2, "outputs: at least one, each with a name"),
    ("inputs.0.datatype", "BYTES", "tensor 'image': datatype 'BYTES'"),
    ("inputs.0.shape", [0], "tensor 'image'"),
    ("inputs.0.shape", [10**30], "over the limit of 2147483648"),
    ("members.0.format", "pickle", "format 'pickle' of 'small' is not one of torch-export"),
    ("members.0.activation", "relu", "activation 'relu' of 'small'"),
    ("members.0.sha256", "zz", "sha256 'zz' of 'small' is not 64 hexadecimal digits"),
    ("members", [], "member 'small' is not listed"),
    ("instances.0.batchSize", 0, "batch size 0 of 'small' is not in 1..65536"),
    ("instances.0.batchSize", 65_537, "batch size 65537"),
    ("instances", [{"member": "small", "batchSize": 1}] * 2, "placed twice"),
    ("instances.0.member", "other", "member 'other' is not listed"),
    ("rowCacheBytes", -1, "rowCacheBytes: -1 is below 0"),
]
BAD_ENSEMBLE = [
    ("gateway.generation", -1, "generation: -1"),
    ("sources.0.digest", "d3", "sources: a version of a member is listed twice"),
    ("rows.cpu-0", [[3, 8]], "rows: 'cpu-0' names member 3 of 3"),
    ("rows.cpu-0", [[-1, 8]], "rows: 'cpu-0' names member -1 of 3"),
    ("rows.cpu-0", [[0, 8], [0, 8]], "rows: 'cpu-0' has a member twice with the same batch size"),
    ("rows.cpu-0", [[0, 0]], "rows: batch size 0 of 'small' is not in 1..65536"),
    ("rows.cpu-0", [[0]], r"`\$.rows\[...\]\[0\]`"),
    ("rowCacheBytes", -1, "rowCacheBytes: -1 is below 0"),
]
BAD_GATEWAY = [
    ("generation", -1, "generation: -1"),
    ("members", [], "members: at least one"),
    ("members", [{"name": f"m{i}", "digest": "d"} for i in range(65)], "members: 65 are over the limit of 64"),
    ("members.1.name", "small", "each with a name of its own"),
    ("members.1.weight", 0, "weight 0.0 of 'big' is not above 0"),
    ("members.1.weight", -2.5, "weight -2.5"),
    ("members.1.format", "h5", "format 'h5' of 'big'"),
    ("rule", "average", "rule: 'average' is not one of mean"),
    ("outputs.0.datatype", "INT64", "rule: 'weightedMean' needs floating outputs"),
    ("quorum", 3, "quorum: 3 is not in 1..2"),
    ("quorum", -1, "quorum: -1"),
    ("workers.1.name", "cpu-0", "workers: a name is listed twice"),
    ("workers.0.address", "ipc:///x", "address 'ipc:///x' of 'cpu-0' is neither unix:PATH nor tcp://HOST:PORT"),
    ("workers.0.address", "unix:", "neither"),
    ("workers.0.address", "tcp://host", "neither"),
    ("workers.0.address", "tcp://host:99999", "neither"),
    ("workers.0.address", "tcp://host:1/path", "neither"),
    ("workers.0.address", "tcp://[::1", "neither"),
    ("timeoutS", 0, "timeoutS: 0.0 is not above 0"),
    ("maxDelayS", -0.1, "maxDelayS: -0.1 is below 0"),
    ("maxQueueBytes", 0, "maxQueueBytes: 0 is not above 0"),
]


@pytest.mark.parametrize(("path", "value", "text"), BAD_WORKER)
def test_bad_worker_plans(path: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidPlan, match=text):
        decode_plan(changed(GOLDEN_WORKER, path, value), WorkerPlan)


@pytest.mark.parametrize(("path", "value", "text"), BAD_GATEWAY)
def test_bad_gateway_plans(path: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidPlan, match=text):
        decode_plan(changed(GOLDEN_GATEWAY, path, value), GatewayPlan)


@pytest.mark.parametrize(("path", "value", "text"), BAD_ENSEMBLE)
def test_bad_mirrors(path: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidPlan, match=text):
        decode_plan(changed(GOLDEN_ENSEMBLE, path, value), EnsemblePlan)


@pytest.mark.parametrize(
    "address", ["unix:/a b", "unix:relative", "tcp://10.0.0.1:1", "tcp://[fd00::1]:65535", "tcp://h.x:9"]
)
def test_addresses(address: str) -> None:
    assert WorkerAddress("w", address).address == address


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"null",
        b"\xff",
        b'{"ensemble":"\xff"}',
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"generation":' + b"9" * 5000,
    ],
    ids=range(8),
)
def test_texts_that_are_no_plan(form: Any, text: bytes) -> None:
    with pytest.raises(InvalidPlan):
        decode_plan(text, form)


def test_a_plan_that_no_configmap_could_hold() -> None:
    members = tuple(ServedMember("m" * 20_000 + str(i), "d") for i in range(64))
    large = msgspec.structs.replace(GATEWAY, members=members, rule="mean")
    with pytest.raises(PlanTooLarge, match=r"the plan has \d+ bytes, over the limit of 900000"):
        encode_plan(large)
    with pytest.raises(InvalidPlan, match="the plan has 900001 bytes"):
        decode_plan(b" " * (MAX_PLAN_BYTES + 1), GatewayPlan)


def test_64_members_on_1000_workers_fit() -> None:
    members = tuple(ServedMember(f"member-{i}", "f" * 64) for i in range(64))
    workers = tuple(
        WorkerAddress(f"pets-gpu-{i}", f"tcp://pets-gpu-{i}.pets-workers.default.svc:5555") for i in range(1000)
    )
    plan = msgspec.structs.replace(GATEWAY, members=members, workers=workers)
    assert decode_plan(encode_plan(plan), GatewayPlan) == plan
    sources = tuple(
        ModelSource(m.name, m.digest, f"s3://models/pets/{m.name}.pt2", "torch-export", sha256="ab" * 32)
        for m in members
    )
    # Each worker runs eight members, and the whole ensemble is placed 125 times.
    rows = {w.name: tuple(((8 * i + j) % 64, 128) for j in range(8)) for i, w in enumerate(workers)}
    mirror = EnsemblePlan(plan, sources, rows)
    assert decode_plan(encode_plan(mirror), EnsemblePlan) == mirror


@given(st.binary(max_size=200))
def test_noise(text: bytes) -> None:
    for form in FORMS:
        with pytest.raises(InvalidPlan):
            decode_plan(text, form)


def test_mutations() -> None:
    """Twenty thousand plans spoilt in a few bytes or values: a plan or InvalidPlan, in little memory."""
    rng = random.Random(11)
    began = time.process_time()
    tracemalloc.start()
    try:
        for _ in range(10_000):
            survives(spoilt_bytes(rng, rng.choice(GOLDEN)))
            survives(spoilt_value(rng, rng.choice(GOLDEN)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert time.process_time() - began < 30


def survives(text: bytes) -> None:
    for form in FORMS:
        try:
            plan = decode_plan(text, form)
        except InvalidPlan:
            continue
        assert decode_plan(encode_plan(plan), form) == plan


def spoilt_bytes(rng: random.Random, golden: str) -> bytes:
    text = bytearray(golden.encode())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(3)] = rng.choice(
            [b"", b'"', b"{", b"}", b"-", b"9" * 30, b"1e999", rng.randbytes(2)]
        )
    return bytes(text)


def spoilt_value(rng: random.Random, golden: str) -> bytes:
    plan = json.loads(golden)
    at: Any = plan
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    at[key] = rng.choice([None, True, -1, 0, 1 << 62, 10**400, 1e308, -0.5, "", "x" * 5000, [], {}, [[]], "\ud800"])
    return json.dumps(plan).encode()
