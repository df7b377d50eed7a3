"""The examples of the documents this server is made for, and of README, run as they are written.

Only the server's address and the picture's are replaced.
"""

import base64
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import DEMO
from tests.clients.environments import ROOT
from tests.clients.expectations import CAPTION, is_caption, is_three
from tests.contracts.pages import README, blocks
from tests.end_to_end.stack import Stack

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = Path(__file__).parent / "documents"
LINK = "https://www.nhmagazine.com/content/uploads/2019/05/mtwashingtonFranconia-2-19-18-108-Edit-Edit.jpg"
PICTURE = DEMO / "picture.png"
SOURCES: dict[str, Callable[[str], str]] = {
    "URL": lambda host: f"http://{host}/picture.png",
    "data URI": lambda _: (
        "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    ),
    "base64": lambda _: base64.b64encode(PICTURE.read_bytes()).decode(),
    "path": lambda _: str(PICTURE),
}


def replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def native_answers(server: Stack, picture: Path) -> list[str]:
    """What the three examples of the first document answer; they go on from each other."""
    examples = blocks(DOCUMENTS / "llava-next-tgi.md", "python")
    assert len(examples) == 3 and all("text_generation" in example for example in examples)
    program = "".join(f"{example}\nprint(repr(response))\n" for example in examples)
    program = replaced(program, "http://localhost:8000", server.url)
    program = replaced(program, "path/to/image.jpg", str(picture))
    return run(sys.executable, "-c", program).splitlines()


def test_native_examples_about_shapes(server: Stack) -> None:
    description, text, answers = native_answers(server, PICTURE)
    assert is_caption(description)
    assert "no text" in text
    assert answers != repr("")


def test_native_examples_about_a_sign(server: Stack) -> None:
    description, text, answers = native_answers(server, DEMO / "samples" / "sign.png")
    assert "EXIT" in description and "blue" in description
    assert "EXIT" in text
    assert answers != repr("")


@pytest.mark.parametrize("source", SOURCES)
def test_chat_example(server: Stack, picture_host: str, source: str) -> None:
    examples = blocks(DOCUMENTS / "llava-http-api.md", "py")
    (over_http,) = [example for example in examples if "from openai import" in example]
    program = replaced(over_http, "http://localhost:1234", server.url)
    program = replaced(program, LINK, SOURCES[source](picture_host))
    assert is_caption(run(sys.executable, "-c", program))


@pytest.mark.parametrize("example", blocks(README, "python"))
def test_readme_examples(server: Stack, example: str) -> None:
    answer = run(sys.executable, "-c", replaced(example, "http://localhost:8000", server.url))
    assert is_caption(answer) if CAPTION in example else is_three(answer)


def test_readme_curl_examples(server: Stack) -> None:
    examples = [block for block in blocks(README, "sh") if block.startswith("curl ")]
    assert examples
    for example in examples:
        reply = run("bash", "-c", replaced(example, "http://localhost:8000", server.url))
        assert '"generated_text":' in reply or '"choices":' in reply, reply[:500]
        assert '"error"' not in reply


def test_readme_chat_example(server: Stack) -> None:
    lines = "".join(blocks(README, "sh")).splitlines()
    (example,) = [line for line in lines if line.startswith("tessera-chat") and "--image" in line]
    command = replaced(example, "tessera-chat", f"{sys.executable} -m tessera.launcher.chat.main")
    assert is_three(run("bash", "-c", replaced(command, "http://localhost:8000", server.url)))
