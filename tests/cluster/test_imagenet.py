"""The ImageNet example in the cluster: models on a claim and over HTTP, the photograph of the cat sent to its Service
by a stock V2 client in a pod. The answer is the one that `ensemble serve` gives on this machine.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import tritonclient.http as v2
import yaml

from tests.cluster.cluster import ROOT, Cluster
from tests.cluster.nodes import claim_of_files
from tests.cluster.serving import Ensemble
from tests.support.serving import SERVED_AT, serving

EXAMPLE = ROOT / "examples/imagenet-lite"
MEMBERS = ("lite0", "lite1", "lite2")
NAME = "imagenet"
CAT = 285
# A folder of `pip install --target` for the Python of our images: `make cluster-test` makes it.
PACKAGES = "ENSEMBLE_TEST_V2_CLIENT"
# Networks of this size are measured first, and the machine may be busy.
READY_S = 240.0
SEND = """
import json, sys
import numpy
import tritonclient.http as v2
rows = numpy.load("/claim/rows.npy")
tensor = v2.InferInput("image", list(rows.shape), "UINT8")
tensor.set_data_from_numpy(rows)
with v2.InferenceServerClient(sys.argv[1], connection_timeout=10, network_timeout=60) as client:
    result = client.infer(sys.argv[2], [tensor], parameters={"members": True})
names = [output["name"] for output in result.get_response()["outputs"]]
print(json.dumps({name: result.as_numpy(name).tolist() for name in names}))
"""

Answer = dict[str, Any]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def packages() -> Path:
    """Where the stock client is, for a pod."""
    if PACKAGES not in os.environ:
        pytest.skip(f"{PACKAGES} must be a folder of `pip install --target` with tritonclient[http]")
    return Path(os.environ[PACKAGES])


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    """The exported networks."""
    found = {f"{name}.pt2": EXAMPLE / "models" / f"{name}.pt2" for name in MEMBERS}
    missing = [str(path) for path in found.values() if not path.exists()]
    assert not missing, f"{missing}: written by {EXAMPLE / 'export.py'}"
    return found


@pytest.fixture(scope="module")
def cat() -> Any:
    """The photograph as the example's client sends it: UINT8 [1, 3, 260, 260]."""
    return runpy.run_path(str(EXAMPLE / "client.py"))["load_photograph"](None)[numpy.newaxis]


@pytest.fixture(scope="module")
def expected(cat: Any, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """What `ensemble serve` of the same networks answers, by output."""
    tensor = v2.InferInput("image", list(cat.shape), "UINT8")
    tensor.set_data_from_numpy(cat)
    with serving(EXAMPLE / "ensemble.yaml", tmp_path_factory.mktemp("cache")) as served:
        served.wait_for(SERVED_AT.pattern, served.out, READY_S)
        served.wait_until_served()
        with v2.InferenceServerClient(served.url.removeprefix("http://"), network_timeout=60) as client:
            result = client.infer(NAME, [tensor], parameters={"members": True})
        assert served.stop() == 0
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


@pytest.fixture(scope="module")
def ensemble(
    cluster: Cluster,
    system: str,
    namespace: str,
    models: dict[str, Path],
    record: Callable[[str], None],
    expected: Answer,  # first, for this machine is busy then
) -> Iterator[Ensemble]:
    """The example, as its file says, Ready."""
    found = Ensemble(cluster, namespace, NAME)
    manifests = re.sub(r"localhost/gateway:\S+", cluster.image("gateway"), (EXAMPLE / "cluster.yaml").read_text())
    with claim_of_files(cluster, namespace, "imagenet-models", models):
        began = time.monotonic()
        for manifest in yaml.safe_load_all(manifests):
            cluster.apply(manifest, namespace)
        found.settled(2, READY_S)
        record(f"{NAME}: Ready {time.monotonic() - began:.1f} s after it was applied")
        yield found
        cluster.kubectl("delete", "inferenceensemble", NAME, "-n", namespace)


@pytest.fixture(scope="module")
def answer(
    cluster: Cluster,
    namespace: str,
    ensemble: Ensemble,
    cat: Any,
    packages: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Answer:
    """What the Service answers to a stock client in a pod, by output."""
    rows = tmp_path_factory.mktemp("photograph") / "rows.npy"
    numpy.save(rows, cat)
    with claim_of_files(cluster, namespace, "client", {"packages": packages, "rows.npy": rows}):
        command = ("env", "PYTHONPATH=/claim/packages", "python", "-c", SEND, f"{NAME}:8000", NAME)
        printed = cluster.run_pod(namespace, "gateway", *command, claim="client")
    return {name: numpy.array(values, numpy.float32) for name, values in json.loads(printed).items()}


def test_the_cat_is_a_cat(answer: Answer) -> None:
    assert answer["probabilities"].shape == (1, 1000)
    assert answer["probabilities"].argmax() == CAT
    for name in MEMBERS:
        assert answer[f"{name}.probabilities"].argmax() == CAT


def test_the_answer_is_the_one_of_ensemble_serve(answer: Answer, expected: Answer) -> None:
    assert set(answer) == set(expected) == {"probabilities", *(f"{name}.probabilities" for name in MEMBERS)}
    for name, values in expected.items():
        numpy.testing.assert_allclose(answer[name], values, rtol=1e-4, err_msg=name)


def test_every_member_lives_and_the_gateways_are_two(cluster: Cluster, namespace: str, ensemble: Ensemble) -> None:
    assert set(ensemble.instances()) == set(MEMBERS)
    assert len(ensemble.pods("gateway")) == 2
    assert len(ensemble.pods("worker")) == 2
    _, row = cluster.kubectl("get", "ie", NAME, "-n", namespace).splitlines()
    assert row.split()[:4] == [NAME, "True", "3/3", "2/2"]
    requested = [
        container["resources"]["requests"]["cpu"]
        for pod in ensemble.pods("worker").values()
        for container in pod["spec"]["containers"]
    ]
    assert requested == ["250m", "250m"]
