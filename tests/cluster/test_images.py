"""Each image runs in a restricted pod, as its user, and holds its own packages and no others'."""

from __future__ import annotations

import json

import pytest

from tests.cluster.cluster import Cluster

# Packages that tell the images apart: what each must have, the others must not.
OWN = {
    "operator": {"ensemble_operator", "kopf", "kubernetes", "scipy"},
    "gateway": {"ensemble_gateway", "uvloop", "httptools"},
    "worker": {"ensemble_worker", "torch", "onnxruntime", "s3fs", "gcsfs", "huggingface_hub", "pynvml"},
}
NEVER = {"pip", "pytest", "matplotlib"}
REPORT = """
import getpass, importlib, importlib.metadata, json, os, sys
def there(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True
written = ""
try:
    open("/opt/ensemble/written", "w")
except OSError as error:
    written = os.strerror(error.errno)
print(json.dumps({
    "modules": [name for name in sys.argv[1:] if there(name)],
    "user": [os.getuid(), getpass.getuser()],
    "written": written,
    "version": importlib.metadata.version("ensemble-operator"),
}))
"""

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize("target", OWN)
def test_an_image_holds_what_its_process_needs_and_no_more(cluster: Cluster, namespace: str, target: str) -> None:
    asked = sorted(set().union(*OWN.values(), NEVER, {"ensemble_contract"}))
    report = json.loads(cluster.run_pod(namespace, target, "python", "-c", REPORT, *asked).splitlines()[-1])
    assert set(report["modules"]) == {*OWN[target], "ensemble_contract"}
    assert report["user"] == [65532, "ensemble"]
    assert report["written"] == "Read-only file system"
    assert report["version"]


@pytest.mark.parametrize(
    ("target", "command", "said"),
    [
        ("operator", ("ensemble_operator", "operator", "--help"), "--namespace"),
        ("gateway", ("ensemble_gateway", "--help"), "--mirror"),
        ("worker", ("ensemble_worker", "serve", "--help"), "--mirror"),
    ],
)
def test_the_process_of_an_image_starts(
    cluster: Cluster, namespace: str, target: str, command: tuple[str, ...], said: str
) -> None:
    assert said in cluster.run_pod(namespace, target, "python", "-m", *command)
