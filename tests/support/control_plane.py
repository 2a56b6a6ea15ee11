"""A real Kubernetes control plane as plain processes: etcd and kube-apiserver; controllers and a scheduler on request.

In a test, take the fixture `control_plane` (one for the whole session, on free ports of 127.0.0.1, RBAC on) or
`namespace` (a new namespace of it, for one test)::

    def test_it(control_plane: ControlPlane, namespace: str) -> None:
        control_plane.start_controllers()      # once, and only if StatefulSets, Deployments or owner references matter
        kubeconfig = control_plane.kubeconfig  # the administrator's; `kubeconfig_for` makes one with given rules
        control_plane.ask("GET", f"/api/v1/namespaces/{namespace}/pods")

A conftest outside of tests/integration gets them by `from tests.support.control_plane import control_plane, namespace`;
it is the same plane. The binaries are looked for in KUBEBUILDER_ASSETS: tests are skipped when that is not set, and
fail when they are not there. CRDs of `crds/` are installed. `tests.support.kubelet` runs the pods, as local processes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.components import CONTROLLERS, Component, dies_with_us, free_ports, tails, write_signing_key
from tests.support.kubeconfigs import token_of, write_kubeconfig

ASSETS = "KUBEBUILDER_ASSETS"
START_S = 90.0
CRDS = Path(__file__).resolve().parents[2] / "crds"
GROUP = "ensemble-operator.io"
# Pods of a namespace made here go to nodes that have its name in this label, and so to no other test's.
NAMESPACE_LABEL = "tests/namespace"
NODE_SELECTOR = "scheduler.alpha.kubernetes.io/node-selector"

STORE = ("etcd", "kube-apiserver")


class Refused(Exception):
    """The API server said no. `status` is the HTTP status, `answer` its Status object."""

    def __init__(self, status: int, answer: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {answer.get('message', answer)}")
        self.status = status
        self.answer = answer


class ControlPlane:
    """etcd and kube-apiserver of one folder, and what else was started. Lives on 127.0.0.1 until `end`."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        self.components: dict[str, Component] = {}
        self.kubeconfig = folder / "admin.kubeconfig"
        self.token = secrets.token_hex(16)
        self.port, self._etcd_port, self._peer_port = free_ports(3)

    @property
    def url(self) -> str:
        """Where the API server is."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        """The file with the certificate that the API server made for itself."""
        return self.folder / "pki" / "apiserver.crt"

    def start(self) -> None:
        """Start etcd and the API server, and install the CRDs."""
        (self.folder / "pki").mkdir(parents=True)
        (self.folder / "tokens.csv").write_text(f"{self.token},admin,admin,system:masters\n")
        write_signing_key(self.folder / "pki" / "sa.key")
        self._run("etcd", *self._etcd_flags())
        self._run("kube-apiserver", *self._api_server_flags())
        self.wait_ready()
        write_kubeconfig(self.kubeconfig, self.url, self.authority, self.token)
        self.install_crds()

    def end(self) -> None:
        """Kill every process, and remove what etcd stored."""
        for component in reversed(self.components.values()):
            component.kill()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def start_controllers(self) -> None:
        """Start the controllers that our children need (CONTROLLERS), once."""
        flags = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0")
        key = self.folder / "pki" / "sa.key"
        self._run(
            "kube-controller-manager",
            *flags,
            f"--controllers={','.join(CONTROLLERS)}",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self.authority}",
            "--horizontal-pod-autoscaler-sync-period=2s",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        )

    def start_scheduler(self) -> None:
        """Start the scheduler, once."""
        flags = (f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0")
        self._run("kube-scheduler", *flags, "--kube-api-qps=500", "--kube-api-burst=1000")

    def freeze_api_server(self) -> None:
        """Connections to it hang from now on."""
        self.components["kube-apiserver"].signal(signal.SIGSTOP)

    def thaw_api_server(self) -> None:
        """It goes on where it was frozen."""
        self.components["kube-apiserver"].signal(signal.SIGCONT)
        self.wait_ready()

    def kill_api_server(self) -> None:
        """Connections to it are refused from now on."""
        self.components["kube-apiserver"].kill()

    def start_api_server(self) -> None:
        """Start it again, on the same port and with the same objects.

        Controllers and scheduler start afresh too: after a long outage each of their watches waits up to a minute
        before it tries again, and until then they act on nodes and pods that are gone.
        """
        self.components["kube-apiserver"].start()
        self.wait_ready()
        for name, component in self.components.items():
            if name not in STORE:
                component.kill()
            component.start()

    def restart_api_server(self) -> None:
        """Kill it and start it again; every watch ends."""
        self.kill_api_server()
        self.start_api_server()

    def compact(self) -> None:
        """Forget all history in etcd. After a restart of the API server a watch from before is answered 410 Gone."""
        everything = base64.b64encode(b"\0").decode()
        found = self._ask_etcd("/v3/kv/range", {"key": everything, "range_end": everything, "count_only": True})
        self._ask_etcd("/v3/kv/compaction", {"revision": found["header"]["revision"], "physical": True})

    def wait_ready(self) -> None:
        """Wait until the API server says so. AssertionError with the logs' ends if it does not."""
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException, Refused):
                self._send("GET", "/readyz", None, "")
                return
            dead = [self.components[name] for name in STORE if not self.components[name].runs]
            assert not dead, tails(dead)
            assert time.monotonic() < deadline, tails(self.components.values())
            time.sleep(0.05)

    def ask(
        self, method: str, path: str, body: object = None, content_type: str = "application/json", token: str = ""
    ) -> Any:
        """One request as the administrator (or with another token); the JSON of its answer. Raises Refused."""
        text = None if body is None else json.dumps(body).encode()
        return json.loads(self._send(method, path, text, content_type, token))

    def new_namespace(self, prefix: str = "test", labels: Mapping[str, str] | None = None) -> str:
        """Make a namespace that nobody else has, with a service account `default`; its name."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        annotations = {NODE_SELECTOR: f"{NAMESPACE_LABEL}={name}"}
        metadata = {"name": name, "labels": dict(labels or {}), "annotations": annotations}
        self.ask("POST", "/api/v1/namespaces", {"metadata": metadata})
        self._make(f"/api/v1/namespaces/{name}/serviceaccounts", {"metadata": {"name": "default"}})
        return name

    def kubeconfig_for(
        self, name: str, rules: Sequence[Mapping[str, Any]], *, namespace: str = "default", narrow: bool = False
    ) -> Path:
        """A kubeconfig of the service account `name` of a namespace, made with exactly these RBAC rules.

        They hold in the whole cluster, or (`narrow`) in that namespace, when this returns. A second call replaces them,
        which the API server learns a moment later: see `wait_permitted`.
        """
        self._make(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
        rbac = "/apis/rbac.authorization.k8s.io/v1" + (f"/namespaces/{namespace}" if narrow else "")
        kind, unique = ("Role", name) if narrow else ("ClusterRole", f"{namespace}-{name}")
        plural = kind.lower() + "s"
        role = {"metadata": {"name": unique}, "rules": list(rules)}
        subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": unique}
        if not self._make(f"{rbac}/{plural}", role):
            self.ask("PATCH", f"{rbac}/{plural}/{unique}", role, "application/merge-patch+json")
        binding = {"metadata": {"name": unique}, "roleRef": reference, "subjects": [subject]}
        is_new = self._make(f"{rbac}/{kind.lower()}bindings", binding)
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        token = self.ask("POST", path, {"spec": {"expirationSeconds": 7200}})["status"]["token"]
        file = self.folder / f"{namespace}-{name}.kubeconfig"
        write_kubeconfig(file, self.url, self.authority, token, namespace)
        if is_new and rules:
            self.wait_permitted(file, rules[0], namespace)
        return file

    def wait_permitted(self, kubeconfig: Path, rule: Mapping[str, Any], namespace: str) -> None:
        """Wait until who has the kubeconfig may do what a rule says: the API server learns of roles by a watch."""
        resource, _, subresource = rule["resources"][0].partition("/")
        attributes = {
            "namespace": namespace,
            "verb": rule["verbs"][0],
            "group": rule["apiGroups"][0],
            "resource": resource,
            "subresource": subresource,
            "name": next(iter(rule.get("resourceNames", ())), ""),
        }
        review = {"spec": {"resourceAttributes": attributes}}
        deadline = time.monotonic() + START_S
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        while not self.ask("POST", path, review, token=token_of(kubeconfig))["status"]["allowed"]:
            assert time.monotonic() < deadline, f"not permitted: {attributes}"
            time.sleep(0.01)

    def install_crds(self) -> None:
        """Apply what `crds/` holds, and wait until the API server serves it."""
        for file in sorted(CRDS.glob("*.yaml")):
            for manifest in yaml.safe_load_all(file.read_text()):
                self._apply_cluster_object(manifest)
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(Refused):
                self.ask("GET", f"/apis/{GROUP}/v1alpha1/inferenceensembles?limit=1")
                return
            assert time.monotonic() < deadline, "the CRD is not served"
            time.sleep(0.05)

    def _apply_cluster_object(self, manifest: Mapping[str, Any]) -> None:
        plural = manifest["kind"].lower() + ("es" if manifest["kind"].endswith("s") else "s")
        plural = plural.replace("policys", "policies")
        path = f"/apis/{manifest['apiVersion']}/{plural}/{manifest['metadata']['name']}"
        self.ask("PATCH", f"{path}?fieldManager=tests&force=true", manifest, "application/apply-patch+yaml")

    def _make(self, path: str, body: Mapping[str, Any]) -> bool:
        """Create an object; False if it is there."""
        try:
            self.ask("POST", path, body)
        except Refused as refused:
            if refused.status != http.HTTPStatus.CONFLICT:
                raise
            return False
        return True

    def _send(self, method: str, path: str, body: bytes | None, content_type: str, token: str = "") -> bytes:
        context = ssl.create_default_context(cafile=str(self.authority))
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": content_type}
        try:
            connection.request(method, path, body, headers)
            with connection.getresponse() as response:
                text = response.read()
                if response.status >= http.HTTPStatus.BAD_REQUEST:
                    raise Refused(response.status, _status_of(text))
                return text
        finally:
            connection.close()

    def _ask_etcd(self, path: str, body: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=30)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                text = response.read()
                assert response.status == http.HTTPStatus.OK, text.decode()
                return json.loads(text)
        finally:
            connection.close()

    def _run(self, name: str, *flags: str) -> None:
        if name not in self.components:
            assert (self.binaries / name).exists(), f"{ASSETS}: there is no {name} in {self.binaries}"
            command = dies_with_us(self.binaries / name, *flags)
            self.components[name] = Component(name, command, self.folder / f"{name}.log")
        self.components[name].start()

    def _etcd_flags(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        return [
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _api_server_flags(self) -> list[str]:
        key = self.folder / "pki" / "sa.key"
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder / 'pki'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=PodNodeSelector,OwnerReferencesPermissionEnforcement",
            "--endpoint-reconciler-type=none",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.96.0.0/16",
        ]


_PLANE = pytest.StashKey[ControlPlane]()


@pytest.fixture(scope="session")
def control_plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ControlPlane:
    """The session's control plane; ended with the session, whatever happens."""
    stash = request.config.stash
    if _PLANE not in stash:
        binaries = os.environ.get(ASSETS, "")
        if not binaries:
            pytest.skip(f"{ASSETS} is not set: the folder of etcd and kube-apiserver (`setup-envtest use -p path`)")
        plane = ControlPlane(Path(binaries), tmp_path_factory.mktemp("control-plane"))
        request.config.add_cleanup(plane.end)
        plane.start()
        stash[_PLANE] = plane
    return stash[_PLANE]


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of its own for a test; asked to go when the test is over."""
    name = control_plane.new_namespace()
    yield name
    with contextlib.suppress(OSError, Refused):
        control_plane.ask("DELETE", f"/api/v1/namespaces/{name}")


def _status_of(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"message": text.decode(errors="replace")}
