"""The committed manifests are what the declaration generates; parser, schema and a real API server agree.

The API server is started from the folder that `KUBEBUILDER_ASSETS` names; without it, its tests are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_operator import crd
from ensemble_operator.api import Combine, parse
from tests.unit.test_api import FULL, MINIMAL
from tests.unit.test_api_bad import BASE, SEEN, changed

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / "crds/ensemble-operator.io_inferenceensembles.yaml"
POLICY = ROOT / "crds/ensemble-operator.io_inferenceensembles_policy.yaml"
START_S = 60
ENSEMBLES = "/apis/ensemble-operator.io/v1alpha1/namespaces/default/inferenceensembles"


@pytest.mark.parametrize(("arguments", "committed"), [([], DEFINITION), (["policy"], POLICY)])
def test_the_committed_manifests_are_the_generated_ones(arguments: list[str], committed: Path) -> None:
    command = [sys.executable, "-m", "ensemble_operator.crd", *arguments]
    generated = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert generated.stdout == committed.read_text(), "run 'make crd'"


def test_what_the_generator_does_not_know() -> None:
    command = [sys.executable, "-m", "ensemble_operator.crd", "chart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr


def schema_of_spec() -> dict[str, Any]:
    version = yaml.safe_load(DEFINITION.read_text())["spec"]["versions"][0]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A document as the API server completes it: defaults of absent properties, at every level."""
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(item, schema["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    absent = {key: copy.deepcopy(part["default"]) for key, part in properties.items() if "default" in part}
    return {
        key: with_defaults(part, properties[key]) if key in properties else part
        for key, part in (absent | value).items()
    }


@pytest.mark.parametrize("document", [MINIMAL, FULL, BASE, changed(("spec.extraDevices", [{"count": 1}]))])
def test_the_schema_and_the_parser_have_the_same_defaults(document: dict[str, Any]) -> None:
    completed = document | {"spec": with_defaults(document["spec"], schema_of_spec())}
    assert completed != document
    assert parse(completed) == parse(document)


def every_part(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for key, part in schema.get("properties", {}).items():
        yield from every_part(part, f"{path}.{key}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from every_part(schema[key], f"{path}.{key}")


def test_every_part_of_the_schema_is_bounded_and_described() -> None:
    for path, part in every_part(schema_of_spec(), "spec"):
        typed = part.get("type")
        assert typed or part.get("x-kubernetes-preserve-unknown-fields") or part.get("x-kubernetes-int-or-string"), path
        if typed == "string":
            assert "maxLength" in part or "enum" in part, path
        elif typed == "array":
            assert "maxItems" in part, path
        elif typed in ("integer", "number"):
            assert {"minimum", "maximum"} <= part.keys(), path
        elif typed == "object" and "additionalProperties" in part:
            assert "maxProperties" in part, path
        for key, inner in part.get("properties", {}).items():
            assert inner.get("description") or path.endswith(
                (".env.items", "volumes.items", "Mounts.items", "Secrets.items")
            ), f"{path}.{key}"


@dataclass(frozen=True, slots=True)
class ApiServer:
    """A real API server without nodes, and its bearer token."""

    url: str
    token: str

    def call(self, method: str, path: str, body: object = None, kind: str = "application/json") -> tuple[int, Any]:
        """Status and JSON answer of one request."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def create(self, document: dict[str, Any], *, dry_run: bool = True) -> tuple[int, Any]:
        """Status and answer of creating an ensemble, as strictly as kubectl does."""
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        return self.call("POST", ENSEMBLES + query, document)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def started(stack: ExitStack, folder: Path, name: str, *command: str | Path) -> None:
    log = stack.enter_context((folder / f"{name}.log").open("wb"))
    process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=log, stderr=log)

    def stop() -> None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)

    stack.callback(stop)


def wait_for(answers: Any, what: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if answers():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{what} after {START_S} s; {log.read_text()[-2000:]}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        pytest.skip("set KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver (setup-envtest downloads them)")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is needed to make the API server's signing key")
    folder = tmp_path_factory.mktemp("api-server")
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    for command in (["genrsa", "-out", "sa.key", "2048"], ["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]):
        subprocess.run([openssl, *command], cwd=folder, check=True, capture_output=True, timeout=60)
    (folder / "tokens.csv").write_text('a-token,admin,1,"system:masters"\n')
    etcd, peer = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
    with ExitStack() as stack:
        flags = ["--data-dir=etcd", f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}"]
        flags += [
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        ]
        started(stack, folder, "etcd", Path(assets, "etcd"), *flags, "--unsafe-no-fsync")
        flags = [
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--cert-dir=certificates",
        ]
        flags += [
            "--token-auth-file=tokens.csv",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
        ]
        flags += ["--service-account-issuer=https://issuer.example", "--service-account-key-file=sa.pub"]
        flags += ["--service-account-signing-key-file=sa.key", "--disable-admission-plugins=ServiceAccount"]
        started(stack, folder, "kube-apiserver", Path(assets, "kube-apiserver"), *flags)
        server = ApiServer(f"https://127.0.0.1:{port}", "a-token")
        log = folder / "kube-apiserver.log"
        wait_for(lambda: server.call("GET", "/api/v1/namespaces/default")[0] == 200, "not ready", log)
        install(server, log)
        yield server


def install(server: ApiServer, log: Path) -> None:
    paths = {
        "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
        "ValidatingAdmissionPolicy": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
        "ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
    }
    for manifest in (crd.definition(), *crd.policy()):
        status, answer = server.call("POST", paths[str(manifest["kind"])], manifest)
        assert status == 201, answer
    wait_for(lambda: server.call("GET", ENSEMBLES)[0] == 200, "the resource is not served", log)
    untyped = changed(("spec.input", 5))
    wait_for(lambda: "must be a mapping" in str(server.create(untyped)[1]), "the policy is not in force", log)


def cluster_ready(document: dict[str, Any]) -> dict[str, Any]:
    """A document without what only this machine may leave out or set: a cluster wants the number of devices."""
    document = copy.deepcopy(document)
    document["metadata"].pop("namespace", None)
    document["metadata"].pop("uid", None)
    document.pop("status", None)
    if "autoscaling" not in document["spec"]:
        document["spec"].setdefault("devices", {}).setdefault("count", 1)
    return document


@pytest.mark.parametrize("document", [MINIMAL, FULL, BASE])
def test_the_api_server_takes_good_documents_and_completes_them_as_the_parser_does(
    api_server: ApiServer, document: dict[str, Any]
) -> None:
    document = cluster_ready(document)
    status, stored = api_server.create(document)
    assert status == 201, stored
    assert parse(stored).spec == parse(document).spec


def test_the_largest_ensemble_is_within_the_cost_of_rules(api_server: ApiServer) -> None:
    members = [
        {"name": f"m{index}", "model": {"uri": f"s3://bucket/{'x' * 1000}/{index}.onnx"}, "weight": 1 + index}
        for index in range(64)
    ]
    sizes = list(range(1, 33))
    document = changed(
        ("spec.members", members),
        ("spec.combine.rule", "weightedMean"),
        ("spec.combine.quorum", 64),
        ("spec.batching.sizes", sizes),
    )
    status, stored = api_server.create(document)
    assert status == 201, stored
    assert parse(stored).spec.combine == Combine("weightedMean", 64)


def test_the_api_server_refuses_what_the_parser_refuses(api_server: ApiServer) -> None:
    for path, value, problem in SEEN:
        status, answer = api_server.create(changed((path, value)))
        assert status in (400, 422), (path, value, problem, answer)


def test_a_cluster_wants_the_number_of_devices_or_their_bounds(api_server: ApiServer) -> None:
    status, answer = api_server.create(MINIMAL)
    assert status == 422
    assert "exactly one of devices.count and autoscaling is needed" in answer["message"]


def test_tensors_are_immutable_and_devices_scale(api_server: ApiServer) -> None:
    status, answer = api_server.create(BASE, dry_run=False)
    assert status == 201, answer
    one = f"{ENSEMBLES}/tiny"
    merge = "application/merge-patch+json"
    for tensors in ({"input": {"shape": [5]}}, {"output": None}, {"input": [BASE["spec"]["input"]]}):
        status, answer = api_server.call("PATCH", one, {"spec": tensors}, merge)
        assert (status, "immutable" in answer["message"]) == (422, True), answer
    status, scale = api_server.call("PATCH", f"{one}/scale", {"spec": {"replicas": 7}}, merge)
    assert (status, scale["spec"]["replicas"]) == (200, 7)
    condition = {
        "type": "Ready",
        "status": "True",
        "reason": "AllMembersLive",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    report = {
        "conditions": [condition],
        "replicas": 7,
        "selector": "a=b",
        "url": "http://tiny",
        "devices": {"summary": "7/7"},
    }
    status, answer = api_server.call("PATCH", f"{one}/status", {"status": report}, merge)
    assert status == 200, answer
    assert (answer["status"], answer["spec"]["devices"]["count"]) == (report, 7)
    assert api_server.call("DELETE", one)[0] == 200
