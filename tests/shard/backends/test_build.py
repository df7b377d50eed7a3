"""Building the CPU kernels, and what happens where that is not possible."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.shard.backends import build, cpu, load_backend

BUILD_FILE = Path(build.__file__)


def run_build(
    *arguments: str, python: tuple[str, ...] = (), path: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, **({} if path is None else {"PATH": path}))
    command = [sys.executable, *python, str(BUILD_FILE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def fake_compiler(tmp_path: Path) -> str:
    file = tmp_path / "refuses"
    file.write_text("#!/bin/sh\necho 'no such dialect' >&2\nexit 1\n")
    file.chmod(0o755)
    return str(file)


def test_no_compiler_on_the_path_is_one_clear_line(tmp_path: Path) -> None:
    done = run_build("--output", str(tmp_path), path=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "no C++ compiler was found (looked for g++, c++)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_is_absent_is_named(tmp_path: Path) -> None:
    done = run_build("--output", str(tmp_path), "--compiler", "g++-of-the-future")
    assert (done.returncode, "g++-of-the-future" in done.stdout) == (0, True)


def test_no_torch_is_one_clear_line(tmp_path: Path) -> None:
    done = run_build("--output", str(tmp_path), python=("-I", "-S"))  # no installed packages
    assert done.returncode == 0
    assert done.stdout.startswith("CPU kernels not built: torch is not installed")


def test_a_failing_compiler_fails_the_build_and_is_quoted(
    tmp_path: Path, fake_compiler: str
) -> None:
    done = run_build("--output", str(tmp_path / "out"), "--compiler", fake_compiler)
    assert done.returncode == 1
    assert "no such dialect" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_what_fits_is_not_built_again(tmp_path: Path, fake_compiler: str) -> None:
    library = build.library_path(tmp_path)
    library.touch()
    assert build.build(tmp_path, fake_compiler) == library


def test_other_sources_or_another_torch_need_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {build.library_path(tmp_path)}
    for file in build.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.library_path(tmp_path) in names
    (tmp_path / "matmul.h").write_text("// changed")
    names.add(build.library_path(tmp_path))
    monkeypatch.setattr(build, "_torch_version", lambda: "99.0")
    names.add(build.library_path(tmp_path))
    assert len(names) == 3


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_without_kernels_the_reference_computes_and_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    library = tmp_path / "tessera_cpu-0.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(cpu, "library_path", lambda: library)
    with caplog.at_level(logging.WARNING):
        assert load_backend("cpu").name == "reference"
    (message,) = (record.getMessage() for record in caplog.records)
    assert "python -m tessera.shard.backends.build" in message
