"""Devices: partitions of cores, control groups, GPUs that may be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ensemble_worker import devices
from ensemble_worker.devices import Device, cgroup_limits, discover, partition, visible_gpus
from ensemble_worker.errors import DeviceUnavailable


@pytest.mark.parametrize(
    ("cores", "count", "groups"),
    [
        ([0], None, [(0,)]),
        ([0, 1, 2], None, [(0,), (1,), (2,)]),
        (list(range(16)), None, [(2 * i, 2 * i + 1) for i in range(8)]),
        ([0, 1, 2, 3], 2, [(0, 1), (2, 3)]),
        ([4, 5, 9], 1, [(4, 5, 9)]),
        ([0, 1, 2, 3, 4], 2, [(0, 1), (2, 3)]),
        ([0, 1], 3, [(0,), (1,), (0,)]),
    ],
)
def test_cores_are_divided_equally(cores: list[int], count: int | None, groups: list[tuple[int, ...]]) -> None:
    assert partition(cores, count) == groups


def _group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_takes_the_tightest_group_on_the_way_up(tmp_path: Path) -> None:
    _group(tmp_path / "pods", cpu__max="150000 100000\n", memory__max="1000\n", memory__current="900\n")
    (tmp_path / "pods" / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    _group(tmp_path / "pods" / "one", cpu__max="max 100000\n", memory__max="max\n", memory__current="10\n")
    limits = cgroup_limits("0::/pods/one\n", tmp_path)
    assert limits.cpus == 1.5
    assert limits.free_bytes == 1000 - (900 - 300)


def test_version_1_with_the_group_mounted_as_root(tmp_path: Path) -> None:
    _group(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    _group(tmp_path / "memory", memory__limit_in_bytes="5000", memory__usage_in_bytes="1000")
    limits = cgroup_limits("4:memory:/kubepods/x\n3:cpu,cpuacct:/kubepods/x\n0::/\n", tmp_path)
    assert limits.cpus == 2.0
    assert limits.free_bytes == 4000


def test_no_limit_is_none(tmp_path: Path) -> None:
    _group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    _group(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1000")
    limits = cgroup_limits("4:memory:/\n3:cpu:/\n", tmp_path)
    assert (limits.cpus, limits.free_bytes) == (None, None)


def test_cpu_devices_divide_memory_and_cores() -> None:
    found = devices.discover(2, environ={})
    assert [d.name for d in found] == ["cpu-0", "cpu-1"]
    assert {d.kind for d in found} == {"cpu"}
    assert set().union(*(d.cores for d in found)) <= os.sched_getaffinity(0)
    assert found[0].capacity_bytes == found[1].capacity_bytes > 0
    assert len({d.device_class for d in found}) == 1


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="0 CPU devices"):
        devices.discover(0, environ={})
    with pytest.raises(DeviceUnavailable, match="must be cpu or cuda"):
        devices.discover(environ={"ENSEMBLE_DEVICE": "tpu"})


def test_an_unknown_device_names_those_there_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r"'cuda-7': this machine has cpu-0"):
        devices.find("cuda-7", [devices.cpu_device(0, (0,), 1)])


def _gpu(index: int) -> Device:
    return Device(f"cuda-{index}", "cuda", index, "H", (), 1, f"GPU-{index}abc")


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-0abc", "GPU-1abc", "GPU-2abc"]),
        ("", []),
        ("2,0", ["GPU-2abc", "GPU-0abc"]),
        ("1,-1,0", ["GPU-1abc"]),
        ("GPU-2", ["GPU-2abc"]),
        ("GPU-", []),
        ("7", []),
    ],
)
def test_visible_gpus_are_numbered_as_cuda_numbers_them(visible: str | None, uuids: list[str]) -> None:
    seen = visible_gpus([_gpu(0), _gpu(1), _gpu(2)], visible)
    assert [d.uuid for d in seen] == uuids
    assert [d.index for d in seen] == list(range(len(seen)))


def test_the_command_prints_json_without_importing_torch() -> None:
    code = (
        "import sys; from ensemble_worker.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "devices", "--cpu-devices", "2"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)["devices"]
    assert [d["name"] for d in listed] == ["cpu-0", "cpu-1"]
    assert set(listed[0]) == {"name", "kind", "index", "deviceClass", "cores", "capacityBytes", "uuid"}


def test_the_command_refuses_nonsense() -> None:
    command = [sys.executable, "-m", "ensemble_worker", "devices", "--cpu-devices", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "must be in 1.." in done.stderr


class _Nvml:
    """A driver that shows one GPU in MIG mode with three places, of which this container may use the second and third.

    Handles are UUIDs.
    """

    NVMLError = RuntimeError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, mig: bool) -> None:
        self.mig = mig

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda _: "GPU-a",
            "nvmlDeviceGetMigMode": lambda _: (int(self.mig), 0),
            "nvmlDeviceGetMaxMigDeviceCount": lambda _: 3,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._part,
            "nvmlDeviceGetName": lambda handle: "A100 MIG 1g.5gb" if handle.startswith("MIG") else "A100",
            "nvmlDeviceGetUUID": lambda handle: handle,
            "nvmlDeviceGetMemoryInfo": self._memory,
        }
        return answers[name]

    def _part(self, _handle: str, place: int) -> str:
        if place == 0:
            raise self.NVMLError("not found")
        return f"MIG-{place}"

    def _memory(self, handle: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=(5 if handle.startswith("MIG") else 40) << 30)


@pytest.mark.parametrize(
    ("mig", "visible", "wanted"),
    [
        (False, None, [("cuda-0", "A100, 40 GiB", "GPU-a")]),
        (True, None, [("cuda-0", "A100 MIG 1g.5gb, 5 GiB", "MIG-1")]),
        (True, "0", [("cuda-0", "A100 MIG 1g.5gb, 5 GiB", "MIG-1")]),
        (True, "MIG-2", [("cuda-0", "A100 MIG 1g.5gb, 5 GiB", "MIG-2")]),
        (True, "", []),
        (True, "MIG-9", []),
    ],
)
def test_a_gpu_in_mig_mode_is_the_one_part_that_cuda_shows(
    mig: bool, visible: str | None, wanted: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml(mig))
    found = discover(environ={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    shown = [(d.name, d.device_class, d.uuid) for d in found if d.kind == "cuda"]
    assert shown == wanted
    assert all(d.capacity_bytes == 5 << 30 for d in found if d.uuid.startswith("MIG"))
