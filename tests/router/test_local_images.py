"""Pictures by path: what is read, what is not, and what a client learns about it."""

import os
from pathlib import Path

import pytest

from tessera.proto.env import SettingsError
from tessera.router.errors import ValidationError
from tessera.router.local_images import LocalImages
from tests.router.test_pictures import png

PICTURE = png()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """pictures/ may be read; secret.png and pictures-too/ beside it may not."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "pictures-too").mkdir()
    for path in ("pictures/a b.png", "pictures/deep/b.png", "secret.png", "pictures-too/c.png"):
        (tmp_path / path).write_bytes(PICTURE)
    return folder


def read(folder: Path, source: str, max_bytes: int = 10**6) -> bytes:
    return LocalImages([str(folder)]).read(source, max_bytes)


@pytest.mark.parametrize(
    "source",
    [
        "{folder}/a b.png",
        " {folder}/a b.png\n",
        "file://{folder}/a%20b.png",
        "FILE://localhost{folder}/a%20b.png",
        "file:{folder}/a%20b.png",
        "{folder}/deep/b.png",
        "{folder}/deep/../a b.png",
        "{folder}//./deep/b.png",
        "{folder}/../pictures/a b.png",
    ],
)
def test_files_below_the_folder_are_read(folder: Path, source: str) -> None:
    assert read(folder, source.format(folder=folder)) == PICTURE


def test_links_that_stay_inside_are_followed_and_the_folder_may_be_one(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "deep" / "b.png")
    (folder.parent / "alias").symlink_to(folder)
    assert read(folder, f"{folder}/link.png") == PICTURE
    assert read(folder.parent / "alias", f"{folder.parent}/alias/a b.png") == PICTURE
    assert read(folder.parent / "alias", f"file://{folder}/a%20b.png") == PICTURE


def test_everything_else_is_told_in_one_sentence(folder: Path) -> None:
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "outside").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    (folder / "unreadable").mkdir(mode=0)
    sources = [
        f"{folder}/out.png",
        f"{folder}/outside/secret.png",
        f"{folder}/../secret.png",
        f"{folder}/../missing.png",
        f"{folder}/deep/../../secret.png",
        f"file://{folder}/%2e%2e/secret.png",
        f"file://{folder}/..%2fsecret.png",
        f"{folder.parent}/secret.png",
        f"{folder}-too/c.png",
        f"{folder}/missing.png",
        f"{folder}/loop",
        f"{folder}/fifo",
        f"{folder}/device",
        f"{folder}/unreadable/x",
        f"{folder}/a b.png/x",
        f"{folder}/deep",
        f"{folder}/",
        f"{folder}/\0",
        f"{folder}/\ud800",
        f"{folder}/{'a' * 300}",
        f"{folder}/{'a/' * 3000}",
        f"file://{folder}/%ff%00",
        f"file://evil.net{folder}/a%20b.png",
        "file:///etc/passwd",
        "file:///missing",
        "file:///dev/zero",
        "file:a%20b.png",
        "file:",
        "file://[",
    ]
    answers = set()
    for source in sources:
        with pytest.raises(ValidationError) as refused:
            read(folder, source)
        answers.add(str(refused.value))
    assert len(answers) == 1, answers
    assert "ALLOWED_IMAGE_PATHS" in answers.pop()


def test_a_folder_exchanged_for_a_link_after_the_check_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def swap_and_open(path: Path, flags: int) -> int:
        (folder / "deep").rename(folder / "old")
        (folder / "deep").symlink_to(folder.parent / "pictures-too")
        return really_open(folder / "deep" / "c.png", flags)

    monkeypatch.setattr("tessera.router.local_images.os.open", swap_and_open)
    with pytest.raises(ValidationError, match="not a readable file"):
        read(folder, f"{folder}/deep/b.png")


def test_size_limit_is_exceeded_by_one_byte(folder: Path) -> None:
    assert len(read(folder, f"{folder}/a b.png", 10)) == 11
    assert read(folder, f"{folder}/a b.png", len(PICTURE)) == PICTURE


def test_off_by_default(folder: Path) -> None:
    with pytest.raises(ValidationError, match="ALLOWED_IMAGE_PATHS"):
        LocalImages([]).read(f"file://{folder}/a%20b.png", 10**6)
    assert not LocalImages([]).covers("/9j/4AAQ")


def test_base64_of_a_jpeg_is_no_path(folder: Path) -> None:
    assert not LocalImages([str(folder)]).covers("/9j/4AAQSkZJRgABAQAAAQ")
    assert not LocalImages([str(folder)]).covers(f"{folder}-too/c.png")


@pytest.mark.parametrize("entry", ["relative", "/does/not/exist", "/", "/dev/null", "/proc/.."])
def test_unusable_folders_are_told_at_the_start(entry: str) -> None:
    with pytest.raises(SettingsError, match="ALLOWED_IMAGE_PATHS"):
        LocalImages([entry])
