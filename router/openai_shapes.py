"""The shapes of OpenAI's replies, for the API's description; tests hold the replies to them."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class LikelyToken(TypedDict):
    """A token, its text as bytes, and its logprob; -9999 stands for minus infinity."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(LikelyToken):
    """A generated token and the likeliest at its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """Logprobs of an answer's tokens, without the one that ends it."""

    content: list[ChosenToken] | None
    refusal: None


class CalledFunctionReply(TypedDict):
    """A function and the JSON text of its arguments, or a piece of that."""

    name: NotRequired[str | None]
    arguments: NotRequired[str]


class ToolCallReply(TypedDict):
    """A function the model calls; `index` on streams only."""

    index: NotRequired[int]
    id: NotRequired[str | None]
    type: NotRequired[Literal["function"] | None]
    function: CalledFunctionReply


class AssistantMessage(TypedDict):
    """An answer, or a piece of one."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallReply]]
    refusal: NotRequired[str | None]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatDelta(TypedDict):
    """A piece of one answer."""

    index: int
    delta: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class PromptTokensDetails(TypedDict):
    """Prompt tokens found in the cache, and those that stand for pictures."""

    cached_tokens: int
    image_tokens: int


class Usage(TypedDict):
    """Tokens, and how fast they came."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    avg_tok_per_sec: float
    avg_prompt_tok_per_sec: float
    avg_compl_tok_per_sec: float
    total_time_sec: float
    total_prompt_time_sec: float
    total_completion_time_sec: float


class Envelope(TypedDict):
    """What replies and chunks have in common. `warnings`: what was done differently than asked."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    warnings: NotRequired[list[str]]


class ChatReply(Envelope):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Envelope):
    """One event of a chat's stream, which ends with `data: [DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Four parallel lists over the tokens of an answer."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionReply(Envelope):
    """A whole completion, or one event of its stream, which ends with `data: [DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]


class OpenAIErrorDetail(TypedDict):
    """What was wrong; `param` is the field at fault, where there is exactly one."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(TypedDict):
    """A refusal or failure as OpenAI's clients read it."""

    error: OpenAIErrorDetail
    error_type: str


class NativeError(TypedDict):
    """A refusal or failure; clients switch on `error_type`."""

    error: str
    error_type: str
