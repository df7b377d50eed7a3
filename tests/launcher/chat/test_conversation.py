import json
from pathlib import Path

import pytest
from PIL import Image

from tessera.launcher.chat.conversation import Conversation
from tessera.launcher.chat.errors import ChatError
from tessera.launcher.chat.pictures import read_picture, sources


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (3, 2)).save(path)
    return path


def test_pictures_go_with_the_next_question_only(picture: Path) -> None:
    conversation = Conversation("Be brief.")
    conversation.pictures = [read_picture(str(picture))]
    system, asked = conversation.request("What?")
    assert system == {"role": "system", "content": "Be brief."}
    assert asked["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert asked["content"][1] == {"type": "text", "text": "What?"}
    assert len(conversation.pictures) == 1  # nothing was answered yet
    conversation.answered("What?", "A dot.")
    assert conversation.request("Why?")[1:] == [
        asked,
        {"role": "assistant", "content": "A dot."},
        {"role": "user", "content": "Why?"},
    ]


def test_what_is_saved(picture: Path) -> None:
    conversation = Conversation("Be brief.", pictures=[read_picture(str(picture))])
    conversation.answered("What?", "A dot.")
    assert conversation.as_text() == (
        f"System: Be brief.\n\nYou: [{picture} (3 x 2)] What?\n\nAnswer: A dot.\n"
    )
    assert json.loads(conversation.as_json()) == conversation.request("x")[:-1]
    conversation.clear()
    assert conversation.as_text() == "System: Be brief.\n"


def test_urls_are_the_servers_business() -> None:
    assert read_picture("https://example.org/a.png").url == "https://example.org/a.png"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.png", None, "No such file or directory"),
        ("text.png", b"hello", "this is no picture"),
        (".", None, "Is a directory"),
        ("a\0b", None, "this is no picture"),
    ],
)
def test_what_is_no_picture(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    source = str(tmp_path / name)
    if content is not None:
        Path(source).write_bytes(content)
    with pytest.raises(ChatError) as told:
        read_picture(source)
    assert str(told.value) == f"{source}: {reason}"


def test_paths_with_spaces_quotes_and_neighbours(picture: Path) -> None:
    assert sources(str(picture)) == [str(picture)]
    assert sources(f"'{picture}' https://x/y.png") == [str(picture), "https://x/y.png"]
    assert sources("it's.png") == ["it's.png"]
    assert sources("x" * 5000) == ["x" * 5000]
