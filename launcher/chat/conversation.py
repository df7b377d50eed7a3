"""What was said so far, and what goes with the next question."""

import json
from dataclasses import dataclass, field
from typing import Any

from tessera.launcher.chat.pictures import Picture

Message = dict[str, Any]  # as OpenAI's API has it


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its pictures, and the answer."""

    question: str
    pictures: tuple[Picture, ...]
    answer: str


@dataclass(slots=True)
class Conversation:
    """Changed only by what is answered, so that a question that failed can be asked again."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)  # for the next question

    def request(self, question: str) -> list[Message]:
        """The messages that ask `question`."""
        messages = self._messages()
        return [*messages, _user(question, tuple(self.pictures))]

    def answered(self, question: str, answer: str) -> None:
        """`question` with its pictures was answered, if only in part."""
        self.turns.append(Turn(question, tuple(self.pictures), answer))
        self.pictures.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.turns.clear()
        self.pictures.clear()

    def as_text(self) -> str:
        """For people; pictures by their names."""
        parts = [f"System: {self.system}"] if self.system else []
        for turn in self.turns:
            shown = "".join(f"[{picture}] " for picture in turn.pictures)
            parts += [f"You: {shown}{turn.question}", f"Answer: {turn.answer}"]
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> str:
        """The messages as they would be sent, pictures included."""
        return json.dumps(self._messages(), ensure_ascii=False, indent=2) + "\n"

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            messages.append(_user(turn.question, turn.pictures))
            messages.append({"role": "assistant", "content": turn.answer})
        return messages


def _user(question: str, pictures: tuple[Picture, ...]) -> Message:
    if not pictures:
        return {"role": "user", "content": question}
    parts: list[Message] = [
        {"type": "image_url", "image_url": {"url": picture.url}} for picture in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
