"""A conversation at the terminal: questions, and commands that begin with a slash."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.launcher.chat.conversation import Conversation
from tessera.launcher.chat.errors import ChatError
from tessera.launcher.chat.pictures import read_picture, sources
from tessera.launcher.chat.server import Server
from tessera.launcher.chat.terminal import Prompt, Terminal

HELP = {
    "image": "PATH-OR-URL...  send pictures with the next message",
    "system": "[TEXT]  set the system prompt; without text: none",
    "clear": "forget the conversation",
    "history": "show the conversation",
    "save": "FILE  write the conversation; FILE.json: as messages, pictures included",
    "help": "this list",
    "quit": "leave, as Ctrl-D does",
}


class Session:
    """Keeps the conversation; everything else is handed in."""

    def __init__(
        self,
        server: Server,
        model: str,
        terminal: Terminal,
        sampling: Mapping[str, Any],
        system: str = "",
    ) -> None:
        self._server = server
        self._model = model
        self._terminal = terminal
        self._sampling = sampling
        self.conversation = Conversation(system)

    def run(self, prompt: Prompt) -> None:
        """Until the user leaves. Ctrl-C ends an answer or empties the line, never the session."""
        while True:
            try:
                line = prompt.read(len(self.conversation.pictures)).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.ask(line)
            except ChatError as error:
                self._terminal.fail(str(error))
            except KeyboardInterrupt:
                self._terminal.note("stopped")

    def ask(self, question: str) -> None:
        """Ask, print the answer, remember both; a part of an answer counts, none does not.

        Raises:
            ChatError, KeyboardInterrupt: the answer is not whole.
        """
        messages = self.conversation.request(question)
        answer = self._server.ask(self._model, messages, self._sampling)
        try:
            self._terminal.answer(answer)
        finally:
            if answer.text or answer.usage is not None:
                self.conversation.answered(question, answer.text)

    def command(self, line: str) -> None:
        """Do what a line with a slash says.

        Raises:
            ChatError: it cannot be done.
        """
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name not in HELP:
            raise ChatError(f"there is no command /{name}; /help lists what there is.")
        if name in ("image", "save") and not argument:
            raise ChatError(f"/{name} {HELP[name]}")
        if name == "image":
            self.attach(sources(argument))
        elif name == "system":
            self.conversation.system = argument
        elif name == "clear":
            self.conversation.clear()
        elif name == "history":
            self._terminal.note(self.conversation.as_text().strip() or "nothing was said yet")
        elif name == "save":
            self._save(argument)
        else:
            self._terminal.note("\n".join(f"/{name} {told}" for name, told in HELP.items()))

    def attach(self, where: list[str]) -> None:
        """Send these pictures with the next question: all of them, or none if one fails.

        Raises:
            ChatError: which and why.
        """
        pictures = [read_picture(source) for source in where]
        self.conversation.pictures += pictures
        for picture in pictures:
            self._terminal.preview(picture)
            self._terminal.note(f"picture: {picture}")

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        is_json = path.suffix.lower() == ".json"
        try:
            path.write_text(
                self.conversation.as_json() if is_json else self.conversation.as_text(),
                encoding="utf-8",
            )
        except OSError as error:
            raise ChatError(f"{name}: {error.strerror}") from None
        self._terminal.note(f"saved {name}")
