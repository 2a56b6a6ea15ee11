"""Each image runs in a restricted pod, as its user, is small, and holds its own packages and no others'.

ENSEMBLE_TEST_ARCHIVES names the folder of the images' archives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.archives import Size, above_the_base
from tests.cluster.cluster import Cluster

ARCHIVES = "ENSEMBLE_TEST_ARCHIVES"
MB = 10**6
# The most that an image may have above its base.
LIMITS = {target: Size(150 * MB, 300 * MB) for target in ("operator", "gateway")}

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


def test_an_image_is_small(record: Callable[[str], None]) -> None:
    if ARCHIVES not in os.environ:
        pytest.skip(f"{ARCHIVES} must name the folder of operator.tar and gateway.tar")
    sizes = above_the_base({target: Path(os.environ[ARCHIVES], f"{target}.tar") for target in LIMITS})
    for target, size in sizes.items():
        packed, unpacked = size.packed_bytes / MB, size.unpacked_bytes / MB
        record(f"image {target}: {packed:.0f} MB compressed, {unpacked:.0f} MB unpacked above the base")
    for target, limit in LIMITS.items():
        assert sizes[target].packed_bytes < limit.packed_bytes, sizes
        assert sizes[target].unpacked_bytes < limit.unpacked_bytes, sizes
