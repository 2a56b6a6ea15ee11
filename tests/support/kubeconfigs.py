"""The kubeconfigs of a test's control plane, of one user each."""

from __future__ import annotations

import base64
import json
from pathlib import Path


def write_kubeconfig(file: Path, url: str, authority: Path, token: str, namespace: str = "default") -> None:
    """A kubeconfig, for its owner's eyes only: the API server at `url`, trusted by its certificate `authority`."""
    certificate = base64.b64encode(authority.read_bytes()).decode()
    cluster = {"server": url, "certificate-authority-data": certificate}
    context = {"cluster": "test", "user": "user", "namespace": namespace}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": context}],
    }
    file.write_text(json.dumps(content))
    file.chmod(0o600)


def token_of(file: Path) -> str:
    """The token of a kubeconfig that `write_kubeconfig` wrote."""
    return str(json.loads(file.read_text())["users"][0]["user"]["token"])
