"""What the user reads and types."""

import contextlib
import sys

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter, PathCompleter
from prompt_toolkit.formatted_text import HTML
from rich.console import Console
from rich.status import Status
from rich.text import Text

from tessera.launcher.chat.pictures import Picture
from tessera.launcher.chat.server import Answer
from tessera.launcher.terminal_picture import half_blocks

PREVIEW_COLUMNS, PREVIEW_ROWS = 40, 16
_KEPT = (ord("\n"), ord("\t"))
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in _KEPT}


def harmless(text: str) -> str:
    """`text` without the codes that move cursors, set titles or write to clipboards."""
    return text.translate(_CONTROLS)


class Terminal:
    """Answers go to stdout; everything about them goes there too, or to stderr for a script."""

    def __init__(self, interactive: bool) -> None:
        self._out = Console(highlight=False)
        self._notes = self._out if interactive else Console(stderr=True, highlight=False)

    def answer(self, answer: Answer) -> None:
        """Print an answer as it comes, then what is known about it.

        Raises:
            ChatError: it failed; what came before is printed.
            KeyboardInterrupt: the user has had enough; likewise.
        """
        waiting = Status("", console=self._notes, spinner="dots")
        try:
            waiting.start()
            for piece in answer:
                waiting.stop()
                self._out.out(harmless(piece), end="", highlight=False)
        finally:
            waiting.stop()
            if answer.text:
                self._out.out("")
        self.note(" · ".join(numbers(answer)))
        for warning in answer.warnings:
            self.warn(warning)

    def note(self, text: str) -> None:
        """Something beside the conversation."""
        self._notes.print(Text(harmless(text), style="dim"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self._notes.print(Text(harmless(text), style="yellow"), soft_wrap=True)

    def fail(self, text: str) -> None:
        """Say what went wrong, in one line."""
        line = " ".join(harmless(text).split())
        self._notes.print(Text(f"Error: {line}", style="red"), soft_wrap=True)

    def preview(self, picture: Picture) -> None:
        """Show a picture file roughly, on terminals with enough colours."""
        if picture.path is None or picture.size is None or self._out.color_system != "truecolor":
            return
        width, height = picture.size
        columns = max(1, min(PREVIEW_COLUMNS, 2 * PREVIEW_ROWS * width // height))
        with contextlib.suppress(OSError):  # the header was fine, the rest is for the server
            self._out.print(Text.from_ansi(half_blocks(picture.path, columns)))


class Prompt:
    """The line where the user writes: with history, completion, and pastes of many lines."""

    def __init__(self, commands: tuple[str, ...]) -> None:
        paths = {"image": PathCompleter(expanduser=True), "save": PathCompleter(expanduser=True)}
        completer = NestedCompleter({f"/{name}": paths.get(name) for name in commands})
        self._session: PromptSession[str] = PromptSession(
            completer=completer, complete_while_typing=False
        )

    def read(self, num_pictures: int) -> str:
        """What the user types; EOFError after Ctrl-D, KeyboardInterrupt after Ctrl-C."""
        attached = f" [{num_pictures} picture{'s' * (num_pictures > 1)}]" if num_pictures else ""
        return self._session.prompt(HTML(f"<b>you{attached}&gt;</b> "))


def is_interactive() -> bool:
    """Whether there is somebody to chat with."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def numbers(answer: Answer) -> list[str]:
    """What an answer cost, each a few words; tokens per second are those of the whole answer."""
    told = []
    if answer.first_s is not None:
        told.append(f"first token {answer.first_s:.2f} s")
    if answer.usage is None:
        return told
    tokens = answer.usage["completion_tokens"]
    rate = f"{tokens / max(answer.seconds, 1e-9):.1f} tokens/s"
    told.append(f"{tokens} tokens in {answer.seconds:.2f} s ({rate})")
    details = answer.usage.get("prompt_tokens_details") or {}
    told.append(f"prompt {answer.usage['prompt_tokens']}")
    told.append(f"image {details.get('image_tokens') or 0}")
    told.append(f"cached {details.get('cached_tokens') or 0}")
    return told
