"""`ensemble serve` from its command line to its answers and to its end: real processes, real models, real sockets."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.models import export_mlp, make_mlp
from tests.support.serving import Served, serving, wait_until_gone

MEMBERS = {"small": (1, 16), "middle": (2, 32), "large": (3, 64)}
INPUTS = 8
Array = npt.NDArray[np.float32]
ROWS = np.random.default_rng(7).normal(size=(5, INPUTS)).astype(np.float32)


def resource(
    *,
    quorum: int = 3,
    middle: str = "file:models/middle.pt2",
    memory: str = "1Mi",
    measured: tuple[str, ...] = (),
    more: str = "",
) -> str:
    """The trio. Profiles are declared, which saves time, but for the members that shall be measured."""
    uris = {name: f"file:models/{name}.pt2" for name in MEMBERS} | {"middle": middle}
    profile = f"    profile: {{measurements: [{{batchSize: 8, memory: {memory}, latency: 1ms}}]}}\n"
    members = "".join(
        f'  - name: {name}\n    model: {{uri: "{uri}"}}\n    activation: softmax\n{"" if name in measured else profile}'
        for name, uri in uris.items()
    )
    return (
        "apiVersion: ensemble-operator.io/v1alpha1\nkind: InferenceEnsemble\nmetadata: {name: trio}\nspec:\n"
        f"  members:\n{members}"
        f"  input: {{name: x, datatype: FP32, shape: [{INPUTS}]}}\n"
        "  output: {name: y, datatype: FP32, shape: [10]}\n"
        f"  combine: {{rule: mean, quorum: {quorum}}}\n"
        f"  batching: {{maxQueueBytes: 16Mi}}\n{more}"
    )


def expected(members: tuple[str, ...] = tuple(MEMBERS)) -> Array:
    """The mean of the members' softmax, in this process."""
    with torch.inference_mode():
        outputs = [
            torch.softmax(make_mlp(seed=MEMBERS[m][0], inputs=INPUTS, hidden=MEMBERS[m][1])(torch.from_numpy(ROWS)), -1)
            for m in members
        ]
    return torch.stack(outputs).mean(0).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three models and a resource that names them by relative URIs."""
    folder = tmp_path_factory.mktemp("trio")
    (folder / "models").mkdir()
    for name, (seed, hidden) in MEMBERS.items():
        export_mlp(folder / "models" / f"{name}.pt2", seed=seed, inputs=INPUTS, hidden=hidden)
    (folder / "ensemble.yaml").write_text(resource())
    (folder / "measured.yaml").write_text(resource(measured=tuple(MEMBERS)))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def served(folder: Path, cache: Path) -> Iterator[Served]:
    """The trio, measured and served on two CPU devices."""
    with serving(folder / "measured.yaml", cache, "--cpu-devices", "2") as served:
        served.wait_until_served()
        yield served
        children = served.children()
        assert len(children) == 3
        assert served.stop(signal.SIGTERM) == 0
        wait_until_gone(children)


def answer(served: Served) -> Array:
    found = served.ask({"x": ROWS.tolist()})
    assert "outputs" in found, found
    return np.array(found["outputs"][0]["data"], np.float32).reshape(5, 10)


@pytest.mark.slow
class TestServed:
    def test_the_answer_is_the_combination(self, served: Served) -> None:
        np.testing.assert_allclose(answer(served), expected(), rtol=1e-4)

    def test_the_summary_shows_every_member_on_every_device(self, served: Served) -> None:
        text = "\n".join(served.out)
        assert "allocation matrix" in text
        header = next(line for line in served.out if "device" in line)
        assert header.split() == ["device", *MEMBERS, "MiB", "of"]
        for device in ("cpu-0", "cpu-1"):
            cells = next(line for line in served.out if line.split()[:1] == [device]).split()
            assert all(int(cell) >= 1 for cell in cells[1:4]), cells

    @pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
    def test_the_line_to_try_works_when_pasted(self, served: Served) -> None:
        line = served.wait_for(r"^try: (.*)$", served.out)[1]
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=20, check=True)
        assert '"model_name":"trio"' in done.stdout.replace(" ", ""), done.stdout

    def test_a_killed_worker_comes_back_and_nobody_notices(self, served: Served) -> None:
        victim = served.worker("cpu-0")
        victim.kill()
        np.testing.assert_allclose(answer(served), expected(), rtol=1e-4)
        served.wait_for(r"cpu-0: was ended by SIGKILL .*; starts again in 0\.\d s", served.err, 10)
        deadline = time.monotonic() + 30
        while not [c for c in served.children() if "cpu-0" in c.cmdline() and c.pid != victim.pid]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        np.testing.assert_allclose(answer(served), expected(), rtol=1e-4)

    def test_a_killed_gateway_comes_back_at_the_same_port(self, served: Served) -> None:
        gateway = next(c for c in served.children() if "ensemble_gateway" in c.cmdline())
        gateway.kill()
        gateway.wait(10)
        deadline = time.monotonic() + 30
        while True:
            try:
                found = answer(served)
                break
            except (OSError, AssertionError):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        np.testing.assert_allclose(found, expected(), rtol=1e-4)

    def test_the_port_is_in_use_for_others(self, served: Served, folder: Path, cache: Path) -> None:
        port = int(served.url.rpartition(":")[2])
        with serving(folder / "ensemble.yaml", cache, port=port) as second:
            assert second.process.wait(20) == 6
            second.wait_for(rf"^ensemble: 127.0.0.1:{port}: in use: stop what listens there", second.err, 5)


@pytest.mark.slow
def test_what_was_measured_is_kept(served: Served, folder: Path, cache: Path) -> None:
    assert len([line for line in served.err if line.startswith("measuring ")]) == 3
    with serving(folder / "measured.yaml", cache, "--cpu-devices", "2") as second:
        second.wait_for("starting the gateway and 2 workers", second.err)
        assert not [line for line in second.err if "measuring" in line]


@pytest.mark.slow
def test_a_quorum_serves_and_ctrl_c_leaves_nothing(folder: Path, cache: Path) -> None:
    file = folder / "degraded.yaml"
    file.write_text(resource(quorum=2, middle="file:models/none.pt2"))
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:
        environment = {"XDG_RUNTIME_DIR": runtime}
        with serving(file, cache, "--cpu-devices", "1", environment=environment) as served:
            served.wait_until_served()
            warnings = [line for line in served.err if "served without" in line]
            assert len(warnings) == 1
            assert "middle" in warnings[0]
            assert "none.pt2" in warnings[0]
            np.testing.assert_allclose(answer(served), expected(("small", "large")), rtol=1e-4)
            assert sorted(path.name for path in (Path(runtime) / "ensemble-operator").iterdir()) == ["trio.sock"]
            assert len(list(Path(runtime).iterdir())) == 2
            children = served.children()
            assert len(children) == 2
            assert served.stop(signal.SIGINT) == 0
            wait_until_gone(children)
        assert list(Path(runtime).iterdir()) == []


@pytest.mark.slow
def test_over_encrypted_tcp_it_answers_the_same(folder: Path, cache: Path) -> None:
    arguments = ("--cpu-devices", "1", "--link", "zeromq", "--encryption", "curve")
    with serving(folder / "ensemble.yaml", cache, *arguments) as served:
        served.wait_until_served()
        np.testing.assert_allclose(answer(served), expected(), rtol=1e-4)


def test_stopped_while_it_prepares_it_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with serving(folder / "measured.yaml", tmp_path, "--cpu-devices", "1") as served:
        served.wait_for("measuring", served.err, 30)
        children = served.children()
        assert served.stop(signal.SIGHUP) == 0
        wait_until_gone(children)


def test_killed_itself_it_leaves_no_process(folder: Path, cache: Path) -> None:
    with serving(folder / "ensemble.yaml", cache, "--cpu-devices", "2") as served:
        served.wait_for("starting the gateway and 2 workers", served.err, 30)
        deadline = time.monotonic() + 10
        while len(children := served.children()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        served.process.kill()
        wait_until_gone(children)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"middle": "file:models/none.pt2"}, 4, r"ensemble: member 'middle' \(file:///.*/models/none.pt2\): "),
        ({"middle": "file:ensemble.yaml"}, 3, r"spec.members\[1\].format"),
        ({"memory": "60Ti"}, 5, r"ensemble: member '\w+' fits on no device: it needs 62914560 MiB at batch size 8"),
        (
            {"middle": "file:models/none.pt2", "measured": ("middle",)},
            4,
            r"ensemble: member .middle. \(file:///.*/none.pt2\): ",
        ),
        ({"more": "  gateway: {timeout: never}\n"}, 3, r"ensemble: .*: spec.gateway.timeout: "),
    ],
    ids=["model", "format", "memory", "model, when measured", "resource"],
)
def test_exit_codes(folder: Path, cache: Path, change: dict[str, Any], code: int, message: str) -> None:
    file = folder / f"wrong-{code}.yaml"
    file.write_text(resource(**change))
    with serving(file, cache, "--cpu-devices", "1") as served:
        assert served.process.wait(60) == code
        served.wait_for(message, served.err, 5)
        assert not [line for line in served.err if "Traceback" in line]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, ", data plane "),
        (["--help"], 0, "exit codes:"),
        ([], 2, "COMMAND"),
        (["serve", "x.yaml", "--port", "65536"], 2, "'65536' is not a port in 0..65535"),
        (["serve", "/does/not/exist.yaml"], 3, "ensemble: /does/not/exist.yaml: no such file"),
        (["devices", "--cpu-devices", "2"], 0, "cpu-1"),
        (["crd"], 0, "CustomResourceDefinition"),
    ],
    ids=["version", "help", "nothing", "port", "no file", "devices", "crd"],
)
def test_command_line(arguments: list[str], code: int, text: str) -> None:
    command = [sys.executable, "-m", "ensemble_operator", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("suffix", "text"), [(".py", "not compiled"), (EXTENSION_SUFFIXES[0], "compiled")])
def test_the_version_says_whether_the_data_plane_is_compiled(tmp_path: Path, suffix: str, text: str) -> None:
    gateway = tmp_path / "ensemble_gateway"
    gateway.mkdir()
    for name in ("__init__.py", f"engine{suffix}"):
        (gateway / name).write_text("raise AssertionError('it is looked for, not imported')")
    command = [sys.executable, "-m", "ensemble_operator", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert re.fullmatch(rf"ensemble \S+, data plane {text}\n", done.stdout), done.stdout + done.stderr
