"""The commands in the manifests are ones that workers and gateways understand, with the folders of the contract."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ensemble_contract.pod import ADMIN_PORT, DATA_PORT, HTTP_PORT, KEYS_FOLDER, PLAN_FILE, PLAN_FOLDER, STATE_FOLDER
from ensemble_gateway.__main__ import _parser as gateway_parser
from ensemble_operator.manifests import children
from ensemble_worker.arguments import parser as worker_parser
from tests.unit.manifests.cases import SPECS, inputs


def containers(case: str, kind: str) -> list[dict[str, Any]]:
    found = [m["spec"]["template"]["spec"]["containers"] for m in children(inputs(case)) if m["kind"] == kind]
    assert found
    return [dict(container) for (container,) in found]


@pytest.mark.parametrize("case", SPECS)
def test_workers_understand_their_commands(case: str) -> None:
    for container in containers(case, "StatefulSet"):
        assert container["command"][:4] == ["python", "-m", "ensemble_worker", "serve"]
        arguments = worker_parser().parse_args(container["command"][4:])
        assert re.fullmatch(r"cuda-0|cpu-0", arguments.device)
        assert arguments.admin.endswith(f":{ADMIN_PORT}")
        assert arguments.data.endswith(f":{DATA_PORT}")
        assert arguments.mirror == Path(PLAN_FOLDER, PLAN_FILE)
        assert (arguments.keys, arguments.state_dir) == (Path(KEYS_FOLDER), Path(STATE_FOLDER))
        assert Path(STATE_FOLDER) in arguments.cache_dir.parents


@pytest.mark.parametrize("case", SPECS)
def test_gateways_understand_their_commands(case: str) -> None:
    (container,) = containers(case, "Deployment")
    assert container["command"][:3] == ["python", "-m", "ensemble_gateway"]
    arguments = gateway_parser().parse_args(container["command"][3:])
    assert arguments.http.endswith(f":{HTTP_PORT}")
    assert arguments.admin.endswith(f":{ADMIN_PORT}")
    assert arguments.mirror == Path(PLAN_FOLDER, PLAN_FILE)
    assert (arguments.keys, arguments.state_dir) == (Path(KEYS_FOLDER), Path(STATE_FOLDER))
    assert arguments.plan is None


@pytest.mark.parametrize("case", SPECS)
def test_every_path_in_a_command_is_mounted(case: str) -> None:
    for container in containers(case, "StatefulSet") + containers(case, "Deployment"):
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        paths = [Path(part) for part in container["command"] if part.startswith("/")]
        assert paths
        assert [path for path in paths if mounts.isdisjoint({path, *path.parents})] == []
