"""The bodies clients send, as types. Ranges that depend on settings are checked in `validation`.

Fields nobody reads are ignored, and null means absent everywhere, because clients send both. Types
are strict: "0.5" is no number, so that a typo is told instead of guessed at.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1

Count = Annotated[int, Field(ge=0, le=MAX_UINT32)]
Seed = Annotated[int, Field(ge=0, le=MAX_UINT64)]
SignedSeed = Annotated[int, Field(ge=-(2**63), le=MAX_UINT64)]  # OpenAI's may be negative

MAX_ENTRIES = 4096  # of lists whose length no setting limits
T = TypeVar("T")
Entries = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
TokenIds = Annotated[list[Count], Field(fail_fast=True)]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class GenerateParameters(Body):
    """`parameters` of the native routes; names are text-generation-inference's."""

    best_of: Count | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None  # an addition, with OpenAI's meaning
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None  # an addition: least probability, relative to the likeliest token's
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    return_full_text: bool | None = None
    stop: Entries[str] | None = None
    truncate: Count | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Seed | None = None
    top_n_tokens: Count | None = None
    grammar: dict[str, Any] | None = None
    adapter_id: str | None = None
    priority: int | None = None  # this and the next two: additions, about the queue and the cache
    cache_salt: str | None = None
    cache_prompt: bool | None = None


class GenerateBody(Body):
    """POST /generate, /generate_stream, /tokenize and /; only the last reads `stream`."""

    inputs: str
    parameters: GenerateParameters | None = None
    stream: bool | None = None

    @property
    def options(self) -> GenerateParameters:
        """The parameters; all absent if the client sent none."""
        return self.parameters or GenerateParameters()


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class OpenAIBody(Body):
    """What the two OpenAI routes share."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # top_k, min_p and repetition_penalty: additions, as elsewhere
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_ENTRIES)] | None = None
    n: Count | None = None
    seed: SignedSeed | None = None
    stop: str | Entries[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None  # this and the next two: additions, about the queue and the cache
    cache_salt: str | None = None
    cache_prompt: bool | None = None

    @property
    def stop_sequences(self) -> list[str]:
        """`stop` as a list, however it was sent."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def copies(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with one more chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ImageUrl(Body):
    """The inner object of an `image_url` part."""

    url: str


class ContentPart(Body):
    """One part of a message's content: text, or a picture in one of the usual spellings."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None
    url: str | None = None
    image: str | None = None

    @property
    def image_source(self) -> str | None:
        """The picture's data URI, URL or base64, whichever field holds it."""
        nested = self.image_url.url if isinstance(self.image_url, ImageUrl) else self.image_url
        return nested or self.url or self.image


class Message(Body):
    """One turn of a conversation."""

    role: str
    content: str | Entries[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Entries[str] | TokenIds | Entries[TokenIds]
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]
