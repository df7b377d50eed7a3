"""Free memory inside containers."""

from pathlib import Path

import pytest

from tessera.shard.backends.host_memory import (
    free_host_bytes,
    peak_host_bytes,
    reset_host_peak,
    used_host_bytes,
)

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    return folder


def write_group(folder: Path, names: tuple[str, str], limit: str, usage: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


def test_version_1_counts_droppable_page_cache_as_free(tmp_path: Path, proc: Path) -> None:
    (proc / "cgroup").write_text("5:cpu:/x\n4:hugetlb,memory:/docker/abc\n")
    stat = f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n"
    write_group(tmp_path / "memory", V1, str(64 * MIB), 40 * MIB, stat)  # seen from inside
    assert free_host_bytes(proc, tmp_path) == 34 * MIB


def test_version_2_takes_the_tightest_ancestor(tmp_path: Path, proc: Path) -> None:
    (proc / "cgroup").write_text("0::/pod/container\n")
    write_group(tmp_path / "pod", V2, str(50 * MIB), 20 * MIB, "inactive_file 0\n")
    write_group(tmp_path / "pod" / "container", V2, "max", 20 * MIB, "")
    assert free_host_bytes(proc, tmp_path) == 30 * MIB


def test_a_full_group_leaves_nothing(tmp_path: Path, proc: Path) -> None:
    (proc / "cgroup").write_text("0::/\n")
    write_group(tmp_path, V2, "100", 200, "")
    assert free_host_bytes(proc, tmp_path) == 0


def test_without_groups_it_is_what_the_machine_has(tmp_path: Path, proc: Path) -> None:
    assert free_host_bytes(proc, tmp_path) > 16 * MIB


def test_peak_is_at_least_what_is_in_use() -> None:
    if peak_host_bytes() is None:
        pytest.skip("this kernel does not tell the peak")
    reset_host_peak()
    taken = bytearray(64 * MIB)
    in_use = used_host_bytes()
    del taken
    peak = peak_host_bytes()
    assert peak is not None
    assert peak >= in_use - MIB


def test_an_unreadable_peak_is_none(proc: Path) -> None:
    assert peak_host_bytes(proc) is None
    reset_host_peak(proc / "absent")
