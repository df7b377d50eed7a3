"""The picture tasks of Hugging Face's clients: captions and questions, all sent to POST /.

    image_to_text               the picture's bytes, often without a content type
    visual_question_answering   {"inputs": BASE64, "image": BASE64, "question": ...}; older clients
                                leave `inputs` out, and the documented body is the next one
    document_question_answering {"inputs": {"image": BASE64, "question": ...}}

They are asked as chats, so that the model's own template says how, and answered greedily.
"""

import base64
import math
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from tessera.router.errors import ValidationError
from tessera.router.event_stream import finite
from tessera.router.json_body import as_body, read_object
from tessera.router.native_bodies import GenerateBody
from tessera.router.schemas import Body, ChatBody, ContentPart, Message
from tessera.router.token_streams import Collected

CAPTION_QUESTION = "What is shown in this image?"

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # of the formats `images` decodes


@dataclass(frozen=True, slots=True)
class PictureTask:
    """A picture and a question about it."""

    picture: str = field(repr=False)  # whatever an image part of a chat may hold
    question: str | None  # None: a caption is wanted

    def chat(self) -> ChatBody:
        """The same as a conversation."""
        picture = ContentPart(type="image", image=self.picture)
        question = ContentPart(type="text", text=self.question or CAPTION_QUESTION)
        return ChatBody(
            messages=[Message(role="user", content=[picture, question])], temperature=0.0
        )

    def reply(self, answer: Collected) -> dict[str, Any]:
        """What the clients expect; `score` is the probability of the whole answer."""
        text = answer.completion.text.strip()
        if self.question is None:
            return {"generated_text": text}
        logprob = sum(token.logprob for token in answer.tokens)
        return {"answer": text, "score": finite(math.exp(logprob))}


class _PictureQuestion(Body):
    image: str
    question: str


class _QuestionBody(Body):
    """A question about a picture, in any of the places clients put the two."""

    inputs: str | _PictureQuestion | None = None
    image: str | None = None
    question: str | None = None

    def task(self) -> PictureTask:
        if isinstance(self.inputs, _PictureQuestion):
            return PictureTask(self.inputs.image, self.inputs.question)
        picture = self.image or self.inputs
        if not picture:
            raise ValidationError("`image` is required beside `question`.", "image")
        return PictureTask(picture, self.question or "")


async def read_root_body(request: Request) -> GenerateBody | PictureTask:
    """What a client asks POST / for. Raises as `read_body` does."""
    if await _is_picture(request):
        return PictureTask(base64.b64encode(await request.body()).decode(), None)
    value = await read_object(request)
    if value.get("question") is None and not isinstance(value.get("inputs"), dict):
        return as_body(value, GenerateBody)
    return as_body(value, _QuestionBody).task()


async def _is_picture(request: Request) -> bool:
    declared = request.headers.get("content-type")
    if declared is None:
        return (await request.body()).startswith(_SIGNATURES)
    media_type = declared.partition(";")[0].strip().lower()
    return media_type.startswith("image/") or media_type == "application/octet-stream"
