"""Which parameters are in order, and what they become. Pure functions, no tokenising.

The rules, their order and the beginnings of their messages are text-generation-inference's, because
clients match on them; every number is checked here so that no shard ever meets an impossible one.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from tessera.router.errors import SuffixUnsupported, TooManyPrompts, ValidationError
from tessera.router.grammar import Grammar
from tessera.router.request import SamplingParams
from tessera.router.schemas import (
    MAX_UINT64,
    ChatBody,
    CompletionBody,
    OpenAIBody,
)
from tessera.router.settings import RouterSettings

# Logits divided by less than this overflow 32-bit floats; sampling is greedy long before.
LEAST_TEMPERATURE = 1e-4
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_STOP_CHARS = 1000
MAX_TOP_K = 2**31 - 1
LEAST_PRIORITY = -100
MAX_SALT_CHARS = 256
OPENAI_TOP_N = 20  # most `top_logprobs` that OpenAI's API allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a client asked for, in one vocabulary for both APIs. None: left open."""

    sample: bool  # False: always the likeliest token
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None
    top_n_tokens: int = 0
    copies: int = 1  # best_of or n
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on behind an end-of-text token
    min_tokens: int = 0  # neither end-of-text tokens nor stop sequences end it before
    priority: int = 0  # higher goes first
    cache_salt: str = ""  # cached prefixes are shared by requests with the same salt only
    cache_prompt: bool = True  # False: neither take cached prefixes nor leave any
    names: Mapping[str, str] = field(default_factory=dict)
    """What the client calls a field where that is not our name for it."""

    def name(self, ours: str) -> str:
        """The client's name of a field."""
        return self.names.get(ours, ours)


def chat_wishes(body: ChatBody) -> Wishes:
    """OpenAI's chat API: samples at temperature 1 unless told otherwise.

    Raises:
        ValidationError: two fields contradict each other.
    """
    if body.top_logprobs and not body.logprobs:
        raise ValidationError("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    newer = body.max_completion_tokens
    return _openai_wishes(
        body,
        body.max_tokens if newer is None else newer,
        body.top_logprobs or 0,
        {
            "max_new_tokens": "max_tokens" if newer is None else "max_completion_tokens",
            "top_n_tokens": "top_logprobs",
        },
    )


def completion_wishes(body: CompletionBody) -> Wishes:
    """OpenAI's older API, with the same defaults as chat."""
    names = {"max_new_tokens": "max_tokens", "top_n_tokens": "logprobs"}
    # A prompt alone is computed with the first token after it, which the reply leaves out.
    max_new_tokens = 1 if body.wants_no_answer else body.max_tokens
    return _openai_wishes(body, max_new_tokens, body.logprobs or 0, names)


def _openai_wishes(
    body: OpenAIBody, max_new_tokens: int | None, top_n_tokens: int, names: Mapping[str, str]
) -> Wishes:
    greedy = body.temperature == 0
    return Wishes(
        sample=not greedy,
        temperature=None if greedy else body.temperature,
        top_k=None if body.top_k in (0, -1) else body.top_k,  # both mean off elsewhere
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias or {},
        seed=None if body.seed is None else body.seed % (MAX_UINT64 + 1),
        top_n_tokens=top_n_tokens,
        copies=body.copies,
        max_new_tokens=max_new_tokens,
        stop=tuple(body.stop_sequences),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        cache_prompt=body.cache_prompt is not False,
        names={"copies": "n", **names},
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Where the two APIs differ in what they allow, and the settings that say so."""

    max_copies: int
    copies_setting: str
    max_top_n: int
    top_p_may_be_one: bool

    @classmethod
    def native(cls, settings: RouterSettings) -> "Limits":
        """text-generation-inference's."""
        return cls(settings.max_best_of, "MAX_BEST_OF", settings.max_top_n_tokens, False)

    @classmethod
    def openai(cls, settings: RouterSettings) -> "Limits":
        """OpenAI's, whose clients may ask for 20 alternatives whatever the other API allows."""
        return cls(settings.max_n, "MAX_N", max(OPENAI_TOP_N, settings.max_top_n_tokens), True)


def check(wishes: Wishes, settings: RouterSettings, limits: Limits) -> None:
    """Check every range that needs neither the prompt nor the model.

    Raises:
        ValidationError: the first rule that is broken.
    """
    _check_copies(wishes, limits)
    _check_positive(wishes.temperature, wishes.name("temperature"))
    _check_repetition(wishes.repetition_penalty)
    _check_penalty(wishes.frequency_penalty, "frequency_penalty")
    _check_penalty(wishes.presence_penalty, "presence_penalty")
    _check_share(wishes.top_p, "top_p", one=limits.top_p_may_be_one)
    _check_share(wishes.typical_p, "typical_p", one=False)
    _check_top_k(wishes.top_k)
    if wishes.min_p is not None and not 0 <= wishes.min_p <= 1:
        raise ValidationError("`min_p` must be >= 0.0 and <= 1.0", "min_p")
    _check_positive(wishes.max_new_tokens, wishes.name("max_new_tokens"))
    _check_stop(wishes.stop, settings.max_stop_sequences)
    if wishes.max_new_tokens is not None:
        check_min_tokens(wishes, wishes.max_new_tokens)
    _check_top_n(wishes, limits.max_top_n)
    _check_priority(wishes.priority, settings.max_priority)
    _check_salt(wishes.cache_salt)


def check_min_tokens(wishes: Wishes, max_new_tokens: int) -> None:
    """Check that an answer may be as long as it must be.

    Raises:
        ValidationError: it may not.
    """
    if wishes.min_tokens > max_new_tokens:
        name = wishes.name("max_new_tokens")
        raise ValidationError(
            f"`min_tokens` must be <= `{name}`, which is {max_new_tokens}. "
            f"Given: {wishes.min_tokens}",
            "min_tokens",
        )


def check_end(wishes: Wishes, grammar: Grammar | None) -> None:
    """Check that only one thing decides where an answer ends.

    Raises:
        ValidationError: a grammar does, and the client as well.
    """
    for name in ("min_tokens", "ignore_eos"):
        if grammar is not None and getattr(wishes, name):
            raise ValidationError(
                f"`{name}` cannot be combined with tools or a prescribed form: that decides where "
                f"the answer ends. Leave `{name}` out.",
                name,
            )


def check_chat(body: ChatBody) -> None:
    """What this version cannot do for a chat yet.

    Raises:
        ValidationError: with the field that asks for it.
    """
    if body.chat_template is not None:
        raise ValidationError(
            "`chat_template` cannot be chosen by a request; the server is started with one: "
            "CHAT_TEMPLATE. A finished prompt can be sent to /v1/completions.",
            "chat_template",
        )
    if body.add_generation_prompt and body.continue_final_message:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` cannot both be true: an answer "
            "either goes on with the final message or begins after it.",
            "continue_final_message",
        )


def check_completion(body: CompletionBody, settings: RouterSettings) -> None:
    """What the older OpenAI API is not served, and how many prompts it takes.

    Raises:
        ValidationError: with the field that asks for it.
    """
    if body.suffix:
        raise SuffixUnsupported(
            "Suffix is not supported and can be achieved by preprocessing the prompt.", "suffix"
        )
    if body.best_of is not None and body.best_of > body.copies:
        raise ValidationError(
            "`best_of` above `n` is not supported here; POST /generate has it.", "best_of"
        )
    if not body.prompts:
        raise ValidationError("`prompt` cannot be empty", "prompt")
    if len(body.prompts) > settings.max_client_batch_size:
        raise TooManyPrompts(
            "Number of prompts exceeds the maximum allowed batch size of "
            f"{settings.max_client_batch_size} (MAX_CLIENT_BATCH_SIZE). Given: {len(body.prompts)}",
            "prompt",
        )


def sampling_params(
    wishes: Wishes, vocab_size: int, *, copy: int = 0, prompt_logprobs: bool = False
) -> SamplingParams:
    """Sampling for the `copy`-th answer to the same prompt, each with a seed of its own.

    Raises:
        ValidationError: `logit_bias` names a token the model does not have.
    """
    temperature = 0.0
    if wishes.sample and (wishes.temperature or 1.0) >= LEAST_TEMPERATURE:
        temperature = wishes.temperature or 1.0
    seed = random.getrandbits(64) if wishes.seed is None else (wishes.seed + copy) & MAX_UINT64
    return SamplingParams(
        temperature=temperature,
        top_k=wishes.top_k or 0,
        top_p=_or_one(wishes.top_p),
        typical_p=_or_one(wishes.typical_p),
        min_p=wishes.min_p or 0.0,
        repetition_penalty=_or_one(wishes.repetition_penalty),
        frequency_penalty=wishes.frequency_penalty or 0.0,
        presence_penalty=wishes.presence_penalty or 0.0,
        seed=seed,
        top_n_tokens=wishes.top_n_tokens,
        logit_bias=_logit_bias(wishes.logit_bias, vocab_size),
        prompt_logprobs=prompt_logprobs,
    )


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else vocab_size
        if token_id >= vocab_size:
            raise ValidationError(
                f"`logit_bias` keys must be token ids below {vocab_size}", "logit_bias"
            )
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise ValidationError(
                f"`logit_bias` values must be >= -{MAX_BIAS} and <= {MAX_BIAS}", "logit_bias"
            )
        pairs.append((token_id, value))
    return tuple(pairs)


def _check_copies(wishes: Wishes, limits: Limits) -> None:
    name = wishes.name("copies")
    if wishes.copies == 1:
        return
    if limits.max_copies == 1:
        raise ValidationError(f"`{name}` != 1 is not allowed for this endpoint", name)
    if not 0 < wishes.copies <= limits.max_copies:
        raise ValidationError(
            f"`{name}` must be > 0 and <= {limits.max_copies}. Given: {wishes.copies}. "
            f"The limit is {limits.copies_setting}.",
            name,
        )


def _check_positive(value: float | None, name: str) -> None:
    if value is not None and value <= 0:
        raise ValidationError(f"`{name}` must be strictly positive", name)


def _check_repetition(value: float | None) -> None:
    _check_positive(value, "repetition_penalty")
    if value is not None and not 0.01 <= value <= 100:
        raise ValidationError(
            "`repetition_penalty` must be >= 0.01 and <= 100.0", "repetition_penalty"
        )


def _check_penalty(value: float | None, name: str) -> None:
    if value is not None and not -MAX_PENALTY <= value <= MAX_PENALTY:
        raise ValidationError(f"`{name}` must be >= -{MAX_PENALTY} and <= {MAX_PENALTY}", name)


def _check_share(value: float | None, name: str, *, one: bool) -> None:
    if value is None or 0 < value < 1 or (one and value == 1):
        return
    raise ValidationError(f"`{name}` must be > 0.0 and {'<=' if one else '<'} 1.0", name)


def _check_top_k(value: int | None) -> None:
    _check_positive(value, "top_k")
    if value is not None and value > MAX_TOP_K:
        raise ValidationError(f"`top_k` must be <= {MAX_TOP_K}", "top_k")


def _check_stop(stop: tuple[str, ...], maximum: int) -> None:
    if len(stop) > maximum:
        raise ValidationError(
            f"`stop` supports up to {maximum} stop sequences. Given: {len(stop)}. "
            "The limit is MAX_STOP_SEQUENCES.",
            "stop",
        )
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in stop):
        raise ValidationError(
            f"`stop` sequences must have from 1 to {MAX_STOP_CHARS} characters", "stop"
        )


def _check_priority(value: int, maximum: int) -> None:
    if not LEAST_PRIORITY <= value <= maximum:
        raise ValidationError(
            f"`priority` must be >= {LEAST_PRIORITY} and <= {maximum}. Given: {value}. "
            "The upper limit is MAX_PRIORITY.",
            "priority",
        )


def _check_salt(value: str) -> None:
    if len(value) > MAX_SALT_CHARS:
        raise ValidationError(
            f"`cache_salt` must have at most {MAX_SALT_CHARS} characters. Given: {len(value)}",
            "cache_salt",
        )


def _check_top_n(wishes: Wishes, maximum: int) -> None:
    name = wishes.name("top_n_tokens")
    if wishes.top_n_tokens > maximum:
        raise ValidationError(
            f"`{name}` must be >= 0 and <= {maximum}. Given: {wishes.top_n_tokens}. "
            "The limit is MAX_TOP_N_TOKENS.",
            name,
        )
