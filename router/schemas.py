"""The bodies clients send, as types. Ranges that depend on settings are checked in `validation`.

Fields nobody reads are ignored, and null means absent everywhere, because clients send both. Types
are strict: "0.5" is no number, so that a typo is told instead of guessed at.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1

Count = Annotated[int, Field(ge=0, le=MAX_UINT32)]
# Negative ones are refused by `rules`, in the same words as 0.
MaxTokens = Annotated[int, Field(le=MAX_UINT32, json_schema_extra={"minimum": 0})]
Seed = Annotated[int, Field(ge=0, le=MAX_UINT64)]
SignedSeed = Annotated[int, Field(ge=-(2**63), le=MAX_UINT64)]  # OpenAI's may be negative

MAX_ENTRIES = 4096  # of lists whose length no setting limits
Detail = Literal["auto", "low", "high", "original"]  # low: a picture's overview, no tiles
IgnoreEos = Annotated[
    bool,
    Field(description="Go on behind the end of the text, up to the limit of tokens or a `stop`."),
]
MinTokens = Annotated[
    Count,
    Field(
        description="Generate so many tokens before the answer may end, or a `stop` counts. At "
        "most `max_tokens`; not with tools or a prescribed form."
    ),
]
T = TypeVar("T")
Entries = Annotated[list[T], Field(max_length=MAX_ENTRIES, fail_fast=True)]
TokenIds = Annotated[list[Count], Field(fail_fast=True)]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class OpenAIBody(Body):
    """What the two OpenAI routes share."""

    model: str | None = None
    max_tokens: MaxTokens | None = None
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
    ignore_eos: IgnoreEos | None = None  # this and the next: as in vLLM
    min_tokens: MinTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None  # OpenAI's or text-generation-inference's
    structured_outputs: dict[str, Any] | None = None  # this and the guided_*: as in vLLM
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Entries[str] | None = None
    guided_grammar: str | None = None
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
    def wants_no_answer(self) -> bool:
        """Whether it asks for the prompt alone."""
        return False

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with one more chunk that holds the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ImageUrl(Body):
    """The inner object of an `image_url` part."""

    url: str
    detail: Detail | None = None


class ContentPart(Body):
    """One part of a message's content: text, or a picture in one of the usual spellings."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None
    url: str | None = None
    image: str | None = None
    detail: Detail | None = None
    refusal: str | None = None  # what an assistant said instead of an answer

    @property
    def image_source(self) -> str | None:
        """The picture's data URI, URL or base64, whichever field holds it."""
        nested = self.image_url.url if isinstance(self.image_url, ImageUrl) else self.image_url
        return nested or self.url or self.image

    @property
    def image_detail(self) -> str | None:
        """How finely the picture is to be looked at, whichever field says so."""
        nested = self.image_url.detail if isinstance(self.image_url, ImageUrl) else None
        return nested or self.detail


class CalledFunction(Body):
    """What a call of an earlier turn called."""

    name: str
    arguments: str | dict[str, Any] | None = None  # JSON text, or the object itself


class ToolCall(Body):
    """A call the model made in an earlier turn."""

    id: str | None = None
    function: CalledFunction


class Message(Body):
    """One turn of a conversation."""

    role: str
    content: str | Entries[ContentPart] | None = None
    name: str | None = None
    tool_calls: Entries[ToolCall] | None = None
    tool_call_id: str | None = None  # which call a message of role "tool" answers


class FunctionSpec(Body):
    """A function the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None  # text-generation-inference's name of it
    strict: bool | None = None


class ToolSpec(Body):
    """One entry of `tools`."""

    type: str = "function"
    function: FunctionSpec


class FunctionName(Body):
    """The inner object of `tool_choice`."""

    name: str


class NamedTool(Body):
    """`tool_choice` as an object."""

    function: FunctionName


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
    max_completion_tokens: MaxTokens | None = None  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: Entries[ToolSpec] | None = None
    tool_choice: str | NamedTool | None = None  # "auto", "none", "required" or a name
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None  # text-generation-inference's: words about the tools
    add_generation_prompt: bool | None = None  # this and the next: as in vLLM
    continue_final_message: bool | None = None
    chat_template: Any = None  # refused

    @property
    def is_to_be_continued(self) -> bool:
        """Whether the answer goes on with the final message, which nobody has to say.

        The assistant's is continued unless the client says anything about it.
        """
        said = (self.add_generation_prompt, self.continue_final_message)
        if said == (None, None):
            return self.messages[-1].role == "assistant"
        return bool(self.continue_final_message)


class CompletionBody(OpenAIBody):
    """POST /v1/completions."""

    prompt: str | Entries[str] | TokenIds | Entries[TokenIds]
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: str | None = None

    @property
    def wants_no_answer(self) -> bool:
        """Whether it asks for the prompt alone, with its logprobs perhaps."""
        return bool(self.echo) and self.max_tokens == 0

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]
