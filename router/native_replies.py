"""What the native routes answer: the shapes, and how results become them.

The shapes are types so that mypy holds the code to them and `openapi` can describe them.
"""

from collections.abc import Sequence
from typing import NotRequired, cast

from typing_extensions import TypedDict

from tessera.router.event_stream import finite, number_to_json, text_to_json
from tessera.router.native_bodies import GenerateParameters
from tessera.router.notices import warnings_of
from tessera.router.request import Completion, TokenEvent, TokenInfo
from tessera.router.ticket import Generation
from tessera.router.token_spans import TokenSpan
from tessera.router.token_streams import Collected


class Token(TypedDict):
    """A generated token. `logprob` is null where it is minus infinity."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(TypedDict):
    """A token of the prompt; the first has no logprob."""

    id: int
    text: str
    logprob: float | None


class Answer(TypedDict):
    """How one answer came about. `seed` is null unless it was sampled."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: NotRequired[list[list[Token]]]


class BestOfSequence(Answer):
    """One of the less likely answers."""

    generated_text: str


class Details(Answer):
    """How the likeliest answer came about, and the others."""

    best_of_sequences: NotRequired[list[BestOfSequence]]


class GenerateReply(TypedDict):
    """The answer to one prompt. `warnings`: what was done differently than asked."""

    generated_text: str
    details: NotRequired[Details]
    warnings: NotRequired[list[str]]


class PictureAnswer(TypedDict):
    """The answer to a question about a picture; `score` is its probability."""

    answer: str
    score: float | None


class StreamDetails(TypedDict):
    """How a streamed answer came about."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamEvent(TypedDict):
    """One event of a stream; the text and the details are in the last one."""

    index: int
    token: Token
    top_tokens: NotRequired[list[Token]]
    generated_text: str | None
    details: StreamDetails | None
    warnings: NotRequired[list[str]]


class SpanReply(TypedDict):
    """A token and the characters it stands for; 0 to 0: none."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeReply(TypedDict):
    """A chat as the model's template renders it, and its tokens."""

    tokenize_response: list[SpanReply]
    templated_text: str


class VertexReply(TypedDict):
    """One text per instance, in their order."""

    predictions: list[str]


def generate_reply(
    best: Collected, others: Sequence[Collected], options: GenerateParameters, wants_full: bool
) -> GenerateReply:
    """The reply to one prompt; `wants_full` puts the prompt first."""
    reply: GenerateReply = {
        "generated_text": _text(best.completion, best.generation, wants_full),
    }
    if options.details or options.decoder_input_details:
        reply["details"] = _details(best, others, options, wants_full)
    if warnings := warnings_of([best.generation]):
        reply["warnings"] = warnings
    return reply


def stream_event(
    index: int,
    step: TokenEvent,
    generation: Generation,
    options: GenerateParameters,
    wants_full: bool,
) -> StreamEvent:
    """The `index`-th event of a stream, from 1."""
    payload: StreamEvent = {
        "index": index,
        "token": _token(step.token),
        "generated_text": None,
        "details": None,
    }
    if options.top_n_tokens:
        payload["top_tokens"] = [_token(info) for info in step.top_tokens]
    if step.completion is not None:
        payload["generated_text"] = _text(step.completion, generation, wants_full)
        if options.details:
            payload["details"] = {
                "finish_reason": step.completion.reason.value,
                "generated_tokens": step.completion.generated_tokens,
                "seed": step.completion.seed,
                "input_length": generation.stream.prompt_tokens,
            }
        if warnings := warnings_of([generation]):
            payload["warnings"] = warnings
    return payload


def plain_event(index: int, step: TokenEvent, *, wants_top: bool) -> str:
    """What `stream_event` is as JSON for every event but the last.

    Written as text because a stream has one for every token.
    """
    top = ""
    if wants_top:
        top = f',"top_tokens":[{",".join(map(_token_json, step.top_tokens))}]'
    token = _token_json(step.token)
    return f'{{"index":{index},"token":{token},"generated_text":null,"details":null{top}}}'


def span_replies(spans: Sequence[TokenSpan]) -> list[SpanReply]:
    """Tokens with their places."""
    return [
        {"id": span.id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans
    ]


def _details(
    best: Collected, others: Sequence[Collected], options: GenerateParameters, wants_full: bool
) -> Details:
    likeliest = _answer(best, options)
    if not others:
        return cast(Details, likeliest)  # it lacks a key that may be absent
    sequences: list[BestOfSequence] = [
        {
            "generated_text": _text(one.completion, one.generation, wants_full),
            **_answer(one, options),
        }
        for one in others
    ]
    return {**likeliest, "best_of_sequences": sequences}


def _answer(one: Collected, options: GenerateParameters) -> Answer:
    prefill = one.generation.stream.prompt_logprobs if options.decoder_input_details else []
    answer: Answer = {
        "finish_reason": one.completion.reason.value,
        "generated_tokens": one.completion.generated_tokens,
        "seed": one.completion.seed,
        "prefill": [
            {"id": info.id, "text": info.text, "logprob": finite(info.logprob)} for info in prefill
        ],
        "tokens": [_token(info) for info in one.tokens],
    }
    if options.top_n_tokens:
        answer["top_tokens"] = [[_token(info) for info in top] for top in one.top_tokens]
    return answer


def _token(info: TokenInfo) -> Token:
    return {
        "id": info.id,
        "text": info.text,
        "logprob": finite(info.logprob),
        "special": info.special,
    }


def _token_json(info: TokenInfo) -> str:
    """`_token` as text."""
    special = "true" if info.special else "false"
    text, logprob = text_to_json(info.text), number_to_json(info.logprob)
    return f'{{"id":{info.id},"text":{text},"logprob":{logprob},"special":{special}}}'


def _text(completion: Completion, generation: Generation, wants_full: bool) -> str:
    return generation.request.prompt_text + completion.text if wants_full else completion.text
