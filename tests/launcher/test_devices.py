from collections.abc import Sequence
from pathlib import Path

import pytest

from tessera.launcher.devices import (
    Devices,
    Machine,
    check_backend,
    find_devices,
    run_command,
)
from tessera.launcher.errors import LaunchError

TWO_GPUS = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa-bbbb-cccc-222222222222)
GPU 1: NVIDIA H200 (UUID: GPU-33333333-aaaa-bbbb-cccc-444444444444)
"""
MIG_SLICES = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa-bbbb-cccc-222222222222)
  MIG 3g.71gb     Device  0: (UUID: MIG-aaa)
  MIG 3g.71gb     Device  1: (UUID: MIG-bbb)
"""
XPU_SMI = """\
+-----------+--------------------------------------------------------------------------------------+
| Device ID | Device Information                                                                   |
+-----------+--------------------------------------------------------------------------------------+
| 0         | Device Name: Intel(R) Data Center GPU Max 1550                                       |
|           | Vendor Name: Intel(R) Corporation                                                    |
+-----------+--------------------------------------------------------------------------------------+
| 1         | Device Name: Intel(R) Data Center GPU Max 1550                                       |
+-----------+--------------------------------------------------------------------------------------+
"""


def machine(
    tmp_path: Path,
    *,
    environ: dict[str, str] | None = None,
    commands: dict[str, str] | None = None,
    torch: str = "2.13.0+cu130",
    affinity: Sequence[int] = (0, 1),
) -> Machine:
    def run(argv: Sequence[str]) -> str:
        return (commands or {}).get(argv[0], "")

    return Machine(environ or {}, tmp_path, run, frozenset(affinity), torch)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_plain_machine_has_its_cpu(tmp_path: Path) -> None:
    assert find_devices("auto", machine(tmp_path)) == Devices("cpu", 1, 2)


def test_gpus_are_counted_by_the_drivers_tool(tmp_path: Path) -> None:
    found = find_devices("auto", machine(tmp_path, commands={"nvidia-smi": TWO_GPUS}))
    assert (found.kind, found.count, found.cuda_ids) == ("cuda", 2, ("0", "1"))


def test_slices_of_a_gpu_are_devices_of_their_own(tmp_path: Path) -> None:
    found = find_devices("cuda", machine(tmp_path, commands={"nvidia-smi": MIG_SLICES}))
    assert found.cuda_ids == ("MIG-aaa", "MIG-bbb")


@pytest.mark.parametrize(
    ("environ", "ids"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, ("1",)),
        ({"CUDA_VISIBLE_DEVICES": "1, GPU-3,"}, ("1", "GPU-3")),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, ("0",)),
        ({"CUDA_VISIBLE_DEVICES": "1,2,0"}, ("1",)),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, ("0", "1")),
        ({"NVIDIA_VISIBLE_DEVICES": "5"}, ("0",)),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "void"}, ("0", "1")),
    ],
)
def test_what_the_environment_lets_see(
    tmp_path: Path, environ: dict[str, str], ids: tuple[str, ...]
) -> None:
    here = machine(tmp_path, environ=environ, commands={"nvidia-smi": TWO_GPUS})
    assert find_devices("cuda", here).cuda_ids == ids


@pytest.mark.parametrize(
    "environ", [{"CUDA_VISIBLE_DEVICES": ""}, {"NVIDIA_VISIBLE_DEVICES": "void"}]
)
def test_hidden_gpus_are_not_used(tmp_path: Path, environ: dict[str, str]) -> None:
    here = machine(tmp_path, environ=environ, commands={"nvidia-smi": TWO_GPUS})
    assert find_devices("auto", here).kind == "cpu"
    with pytest.raises(LaunchError, match="DEVICE=cuda but this machine shows no cuda device"):
        find_devices("cuda", here)


def test_a_torch_that_cannot_use_the_gpu_is_told_not_hidden(tmp_path: Path) -> None:
    here = machine(tmp_path, commands={"nvidia-smi": TWO_GPUS}, torch="2.13.0+cpu")
    found = find_devices("auto", here)
    assert found.kind == "cpu"
    assert found.note.startswith("2 cuda device(s) are here, but torch 2.13.0+cpu cannot use them")


def test_one_device_by_its_index(tmp_path: Path) -> None:
    here = machine(tmp_path, commands={"nvidia-smi": TWO_GPUS})
    assert find_devices("cuda:1", here) == Devices("cuda", 1, 2)


def test_intel_gpus_by_their_tool_their_mask_or_the_kernel(tmp_path: Path) -> None:
    here = machine(tmp_path, commands={"xpu-smi": XPU_SMI}, torch="2.13.0+xpu")
    assert find_devices("auto", here) == Devices("xpu", 2, 2)

    for index, vendor in enumerate(("0x8086", "0x1002", "0x8086")):
        write(tmp_path / f"dev/dri/renderD{128 + index}", "")
        write(tmp_path / f"sys/class/drm/renderD{128 + index}/device/vendor", vendor + "\n")
    assert find_devices("xpu", machine(tmp_path)).count == 2
    masked = machine(tmp_path, environ={"ZE_AFFINITY_MASK": "0.0"})
    assert find_devices("xpu", masked).count == 1


def test_without_the_drivers_tool_the_environment_is_believed(tmp_path: Path) -> None:
    here = machine(tmp_path, environ={"CUDA_VISIBLE_DEVICES": "0,7"})
    assert find_devices("cuda", here).cuda_ids == ("0", "7")


@pytest.mark.parametrize(
    "wanted",
    ["tpu", "tpu:0", "", "../cpu", "../engine", "base", "build", "reference", "ipex", "cuda:x"],
)
def test_a_device_nothing_computes_on(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(LaunchError) as refused:
        find_devices(wanted, machine(tmp_path, commands={"nvidia-smi": TWO_GPUS}))
    assert str(refused.value) == (
        f"DEVICE={wanted} is not known; use auto or one of cpu, cuda, xpu, with an index (cuda:1) "
        "or without."
    )


@pytest.mark.parametrize("wanted", ["../engine", "build", "base", "no_such", "__init__", "csrc"])
def test_a_backend_that_is_none(wanted: str) -> None:
    with pytest.raises(LaunchError) as refused:
        check_backend(wanted)
    assert str(refused.value) == (
        f"BACKEND={wanted} is not known; use auto or one of cpu, cuda, ipex, reference, xpu."
    )


@pytest.mark.parametrize("wanted", ["auto", "cpu", "cuda", "xpu", "ipex", "reference"])
def test_backends_that_are_there(wanted: str) -> None:
    check_backend(wanted)


def test_a_device_that_was_added_is_left_to_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tessera.launcher.devices.BACKENDS", tmp_path)
    write(tmp_path / "npu.py", "def available(): ...\ndef create(device): ...\n")
    assert find_devices("npu", machine(tmp_path)) == Devices("npu", 1, 2)


def test_hyperthreads_share_a_core(tmp_path: Path) -> None:
    for core, siblings in enumerate(("0,4", "1,5", "2,6", "3,7") * 2):
        cpu = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        write(cpu, siblings + "\n")
    assert find_devices("cpu", machine(tmp_path, affinity=range(8))).cores == 4
    assert find_devices("cpu", machine(tmp_path, affinity=(0, 4, 1))).cores == 2


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [("cpu.max", "250000 100000", 2), ("cpu.max", "50000 100000", 1), ("cpu.max", "max 100000", 4)],
)
def test_a_containers_quota_limits_the_cores(
    tmp_path: Path, file: str, text: str, cores: int
) -> None:
    write(tmp_path / "sys/fs/cgroup" / file, text + "\n")
    assert find_devices("cpu", machine(tmp_path, affinity=range(4))).cores == cores


def test_a_quota_in_the_older_files(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert find_devices("cpu", machine(tmp_path, affinity=range(8))).cores == 3


def test_a_command_that_is_absent_or_fails_says_nothing() -> None:
    assert run_command(["no-such-command-here"]) == ""
    assert run_command(["false"]) == ""
    assert run_command(["echo", "yes"]) == "yes\n"


def test_this_machine_has_a_core() -> None:
    assert find_devices("cpu", Machine.here({})).cores >= 1
