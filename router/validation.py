"""From a parsed body to `Request`s: the last place where a client is told that it asked wrongly."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.router import rules
from tessera.router.chat_template import ChatTemplate
from tessera.router.errors import ToolError, ValidationError
from tessera.router.generation import Generator, ServingLimits
from tessera.router.grammar import Grammar
from tessera.router.guidance import GuideCompiler
from tessera.router.guidance_compile import Guide, Vocabulary, eos_of
from tessera.router.metrics import Metrics
from tessera.router.model_files import ModelFiles
from tessera.router.native_bodies import GenerateBody
from tessera.router.native_rules import check_native, native_grammar, native_wishes
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.prompt_builder import (
    BuiltPrompt,
    ChatPrompt,
    IdsPrompt,
    PromptBuilder,
    PromptSource,
    TextPrompt,
)
from tessera.router.request import Request, StoppingParams
from tessera.router.request_record import Stages
from tessera.router.response_format import openai_grammar
from tessera.router.rules import Wishes
from tessera.router.schemas import ChatBody, CompletionBody
from tessera.router.settings import RouterSettings
from tessera.router.token_spans import TokenSpan
from tessera.router.tokenizer import Tokenizer
from tessera.router.tool_grammar import tool_grammar
from tessera.router.tool_parser import CallSyntax
from tessera.router.tools import read_tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be generated, checked as far as that needs no tokenising."""

    prompts: Sequence[PromptSource]
    wishes: Wishes
    truncate: int | None = None  # keep only so many tokens, the last ones
    prompt_logprobs: bool = False
    include_stop_text: bool
    grammar: Grammar | None = None  # what every answer must look like
    calls: CallSyntax | None = None  # how the answers may call functions

    @property
    def count(self) -> int:
        """Generations this plan leads to."""
        return len(self.prompts) * self.wishes.copies


class Validator:
    """Checks bodies and builds requests.

    `plan_*` check what costs nothing; `build` does the work, in threads, once the caller has been
    let in.
    """

    def __init__(
        self,
        settings: RouterSettings,
        generator: Generator,
        tokenizer: Tokenizer,
        files: ModelFiles,
        template: ChatTemplate | None,
        metrics: Metrics,
    ) -> None:
        """`generator` is asked for its limits per request: they are known after the warm-up."""
        self._settings = settings
        self._generator = generator
        self._vocab_size = files.vocab_size
        self._prompts = PromptBuilder(settings, tokenizer, files, template, metrics.pictures)
        self._eos_ids = eos_of(tokenizer.eos_ids, files.vocab_size)
        self._guides: GuideCompiler | None = None
        if not settings.disable_grammar_support:
            vocabulary = Vocabulary(tokenizer.definition(), files.vocab_size, self._eos_ids)
            self._guides = GuideCompiler(
                vocabulary, settings.grammar_timeout, settings.max_grammar_bytes
            )

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._prompts.close()
        if self._guides is not None:
            self._guides.close()

    def plan_native(self, body: GenerateBody, *, streaming: bool) -> Plan:
        """Check a body of the native API.

        Raises:
            ValidationError: the first rule it breaks.
        """
        options = body.options
        wishes = native_wishes(options)
        check_native(options, wishes, streaming=streaming)
        rules.check(wishes, self._settings, rules.Limits.native(self._settings))
        if not body.inputs:
            raise ValidationError("`inputs` cannot be empty", "inputs")
        self._check_truncate(options.truncate)
        return Plan(
            prompts=[TextPrompt(body.inputs)],
            wishes=wishes,
            truncate=options.truncate,
            prompt_logprobs=bool(options.decoder_input_details),
            include_stop_text=True,
            grammar=native_grammar(options.grammar),
        )

    def plan_chat(self, body: ChatBody) -> Plan:
        """Check a chat. Raises as `plan_native` does."""
        wishes = rules.chat_wishes(body)
        rules.check_chat(body)
        rules.check(wishes, self._settings, rules.Limits.openai(self._settings))
        continues = body.is_to_be_continued
        add_prompt = body.add_generation_prompt is not False
        tools, grammar, calls = read_tools(body), openai_grammar(body), None
        if tools is not None:
            grammar = tool_grammar(tools, self._prompts.tool_format, grammar)
            calls = CallSyntax(self._prompts.tool_format, tools.names, tools.required)
        rules.check_end(wishes, grammar)
        return Plan(
            prompts=[ChatPrompt(body.messages, add_prompt, continues, tools)],
            wishes=wishes,
            include_stop_text=False,
            grammar=grammar,
            calls=calls,
        )

    def plan_completion(self, body: CompletionBody) -> Plan:
        """Check a plain completion. Raises as `plan_native` does."""
        wishes = rules.completion_wishes(body)
        rules.check_completion(body, self._settings)
        rules.check(wishes, self._settings, rules.Limits.openai(self._settings))
        prompts = [_completion_prompt(prompt) for prompt in body.prompts]
        grammar = openai_grammar(body)
        rules.check_end(wishes, grammar)
        return Plan(
            prompts=prompts,
            wishes=wishes,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            include_stop_text=False,
            grammar=grammar,
        )

    async def build(
        self,
        plan: Plan,
        arrived: float,
        fairness_key: str = "",
        stages: Stages | None = None,
    ) -> list[Request]:
        """The requests of a plan: for each prompt, all its copies.

        Args:
            plan: from one of the `plan_*`.
            arrived: `time.perf_counter()` when the client's request came in.
            fairness_key: whose turn it counts for, see `fairness`.
            stages: where to note how long what took.

        Raises:
            ValidationError: a prompt cannot be read, or is too long; the grammar cannot be used.
            OverloadedError: others' grammars take all the time there is.
            NotReadyError: the limits are not known yet.
        """
        stages = stages or Stages()
        with stages.measured("validation"):
            return await self._build(plan, arrived, fairness_key, stages)

    async def _build(
        self, plan: Plan, arrived: float, fairness_key: str, stages: Stages
    ) -> list[Request]:
        limits = self._generator.limits
        guide = await self._guide(plan, fairness_key, stages)
        requests: list[Request] = []
        allowance = PictureAllowance(self._settings, stages)
        for source in plan.prompts:
            prompt = await self._prompts.build(
                source, limits.max_input_tokens, plan.truncate, allowance
            )
            stopping = self._stopping(plan, prompt, limits)
            validation_s = time.perf_counter() - arrived
            requests += [
                Request(
                    prompt_ids=prompt.ids,
                    images=prompt.images,
                    sampling=rules.sampling_params(
                        plan.wishes,
                        self._vocab_size,
                        copy=copy,
                        prompt_logprobs=plan.prompt_logprobs,
                    ),
                    stopping=stopping,
                    prompt_text=prompt.text,
                    priority=plan.wishes.priority,
                    fairness_key=fairness_key,
                    cache_salt=plan.wishes.cache_salt,
                    use_prefix_cache=plan.wishes.cache_prompt,
                    grammar=plan.grammar,
                    guide=guide,
                    warnings=prompt.warnings,
                    validation_s=validation_s,
                )
                for copy in range(plan.wishes.copies)
            ]
        return requests

    async def tokenize(self, inputs: str) -> list[TokenSpan]:
        """The tokens of a prompt.

        Raises:
            ValidationError: it is empty, cannot be read, or is too long.
        """
        if not inputs:
            raise ValidationError("`inputs` cannot be empty", "inputs")
        _, spans = await self._tokenize(TextPrompt(inputs))
        return spans

    async def tokenize_chat(self, body: ChatBody) -> tuple[str, list[TokenSpan]]:
        """A chat as its template renders it, and the tokens of that. Raises as `build` does."""
        plan = self.plan_chat(body)
        (prompt,) = plan.prompts
        assert isinstance(prompt, ChatPrompt)  # what `plan_chat` makes
        return await self._tokenize(prompt)

    async def _tokenize(self, prompt: TextPrompt | ChatPrompt) -> tuple[str, list[TokenSpan]]:
        maximum = self._generator.limits.max_input_tokens
        return await self._prompts.tokenize(prompt, maximum, PictureAllowance(self._settings))

    async def _guide(self, plan: Plan, fairness_key: str, stages: Stages) -> Guide | None:
        if plan.grammar is None:
            return None
        if self._guides is None:
            raise ValidationError("grammar is not supported", "grammar")
        try:
            with stages.measured("compile grammar"):
                return await self._guides.compile(plan.grammar, fairness_key)
        except ValidationError as error:
            if plan.calls is None:
                raise
            raise ToolError(error.detail, "tools") from None

    def _check_truncate(self, truncate: int | None) -> None:
        maximum = self._generator.limits.max_input_tokens
        if truncate is not None and not 0 < truncate <= maximum:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {maximum}. Given: {truncate}",
                "truncate",
            )

    def _stopping(self, plan: Plan, prompt: BuiltPrompt, limits: ServingLimits) -> StoppingParams:
        num_tokens = len(prompt.ids)
        _check_length(plan.wishes, prompt, limits, self._settings.image_overflow)
        room = limits.max_total_tokens - num_tokens
        asked = plan.wishes.max_new_tokens
        max_new_tokens = room if asked is None else asked
        rules.check_min_tokens(plan.wishes, max_new_tokens)
        return StoppingParams(
            max_new_tokens=max_new_tokens,
            stop_sequences=plan.wishes.stop,
            ignore_eos=plan.wishes.ignore_eos,
            min_tokens=plan.wishes.min_tokens,
            end_ids=self._eos_ids,
            include_stop_text=plan.include_stop_text,
        )


def _completion_prompt(prompt: str | list[int]) -> PromptSource:
    if not prompt:
        raise ValidationError("`prompt` cannot be empty", "prompt")
    return TextPrompt(prompt) if isinstance(prompt, str) else IdsPrompt(tuple(prompt))


def _check_length(
    wishes: Wishes, prompt: BuiltPrompt, limits: ServingLimits, image_overflow: str
) -> None:
    num_tokens = len(prompt.ids)
    parts = _token_parts(prompt)
    asked = wishes.max_new_tokens
    if asked is not None and num_tokens + asked > limits.max_total_tokens:
        name = wishes.name("max_new_tokens")
        raise ValidationError(
            f"`inputs` tokens + `{name}` must be <= {limits.max_total_tokens}. Given: "
            f"{num_tokens} `inputs` tokens{parts} and {asked} `{name}`. Lower `{name}`, shorten "
            "the prompt, or raise MAX_TOTAL_TOKENS.",
            name,
        )
    if num_tokens > limits.max_input_tokens:
        raise ValidationError(
            f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_tokens}"
            f"{parts}. {_ways_out(prompt, image_overflow)}"
        )


def _ways_out(prompt: BuiltPrompt, image_overflow: str) -> str:
    """What to do about a prompt that is too long."""
    if not prompt.images:
        return "Shorten the text, or raise MAX_INPUT_TOKENS."
    send = "Send fewer or smaller pictures or less text, or start the server with"
    if image_overflow == "fit":
        return f"The pictures are reduced as far as possible. {send} a larger MAX_INPUT_TOKENS."
    return f"{send} a larger MAX_INPUT_TOKENS or IMAGE_OVERFLOW=fit, which reduces pictures."


def _token_parts(prompt: BuiltPrompt) -> str:
    """How many of the tokens are pictures, where there are any."""
    image_tokens = sum(placed.image.num_tokens for placed in prompt.images)
    if not image_tokens:
        return ""
    text_tokens = len(prompt.ids) - image_tokens
    return f" ({text_tokens} text tokens and {image_tokens} image tokens)"
