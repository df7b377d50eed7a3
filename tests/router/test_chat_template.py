import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.router.chat_template import ChatTemplate
from tessera.router.errors import TemplateError
from tessera.router.model_files import ModelFilesError
from tessera.router.tokenizer import Tokenizer
from tests import checkpoints
from tests.checkpoints import CHATML_TEMPLATE, LLAMA2_TEMPLATE, MISTRAL_TEMPLATE, VICUNA_TEMPLATE

Checkpoint = Callable[[str], Path]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML_STRING_TEMPLATE = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
EITHER_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)
SELECTING_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' }}\n"
    "    {# all pictures, then all words #}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}{% else %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
)
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PIC = {"type": "image_url", "image_url": {"url": "data:"}}
LIST_TEMPLATES = {
    "mistral": MISTRAL_TEMPLATE,
    "vicuna": VICUNA_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
    "either": EITHER_TEMPLATE,
    "selecting": SELECTING_TEMPLATE,
}
STRING_TEMPLATES = {
    "llama2": LLAMA2_TEMPLATE,
    "chatml-string": CHATML_STRING_TEMPLATE,
    "strict": STRICT_TEMPLATE,
}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    whole = len(parts) == 1 and isinstance(parts[0], str)
    content = parts[0] if whole else [text(p) if isinstance(p, str) else p for p in parts]
    return {"role": "user", "content": content}


def says(words: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": words}


def shown(source: str, *messages: dict[str, Any], **options: Any) -> str:
    """The prompt, with {n} where picture n is."""
    parts = ChatTemplate(source, TOKENS).render(messages, **options)
    return "".join(part if isinstance(part, str) else f"{{{part}}}" for part in parts)


@pytest.mark.parametrize("name", LIST_TEMPLATES)
def test_templates_that_want_lists(name: str) -> None:
    assert ChatTemplate(LIST_TEMPLATES[name], TOKENS).wants_lists


@pytest.mark.parametrize("name", STRING_TEMPLATES)
def test_templates_that_want_strings(name: str) -> None:
    assert not ChatTemplate(STRING_TEMPLATES[name], TOKENS).wants_lists


@pytest.mark.parametrize("content", ["Why?", [text("Why?")], [text("Wh"), text("y?")]])
@pytest.mark.parametrize("name", [*STRING_TEMPLATES, "mistral", "chatml", "either"])
def test_strings_and_lists_print_the_same(name: str, content: Any) -> None:
    source = (LIST_TEMPLATES | STRING_TEMPLATES)[name]
    message = {"role": "user", "content": content}
    assert shown(source, message) == shown(source, user("Why?"))
    assert "Why?" in shown(source, message)


def test_mistral() -> None:
    assert (
        shown(
            MISTRAL_TEMPLATE,
            says("SYS.", "system"),
            user("What?", PIC),
            says("A cat."),
            user("Sure?"),
        )
        == "<<SYS>>\nSYS.\n<</SYS>>\n\n[INST] {0}\nWhat? [/INST] A cat.</s> [INST] Sure? [/INST]"
    )


def test_vicuna() -> None:
    assert (
        shown(
            VICUNA_TEMPLATE, says("SYS.", "system"), user(PIC, "What?"), says("A cat."), user("?")
        )
        == "SYS. USER: {0}\nWhat? ASSISTANT: A cat. USER: ? ASSISTANT:"
    )


def test_chatml() -> None:
    expected = "<|im_start|>user\n{0}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(CHATML_TEMPLATE, user(PIC, "What?")) == expected
    assert shown(CHATML_STRING_TEMPLATE, user(PIC, "What?")) == expected


def test_llama2() -> None:
    assert (
        shown(LLAMA2_TEMPLATE, user("Hi"), says("Ho"), user("He"))
        == "<s>[INST] Hi [/INST] Ho </s><s>[INST] He [/INST]"
    )


def test_strict_llama2() -> None:
    assert (
        shown(STRICT_TEMPLATE, says("S", "system"), user(PIC, " Hi "), says("Ho"))
        == "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n{0}\n Hi [/INST] Ho </s>"
    )
    with pytest.raises(TemplateError, match="roles must alternate"):
        shown(STRICT_TEMPLATE, user("a"), user("b"))


def test_pictures_stand_in_strings_where_they_were_sent() -> None:
    assert shown(LLAMA2_TEMPLATE, user("A", PIC, "B", PIC)) == "<s>[INST] A{0}\nB{1} [/INST]"
    assert shown(LLAMA2_TEMPLATE, user(PIC, PIC, "\nB")) == "<s>[INST] {0}{1}\nB [/INST]"


def test_all_texts_of_other_roles_are_printed() -> None:
    message = {"role": "assistant", "content": [text("A "), text("cat.")]}
    assert "A cat.</s>" in shown(MISTRAL_TEMPLATE, user("What?"), message, user("?"))


def test_several_turns_with_pictures() -> None:
    assert shown(VICUNA_TEMPLATE, user(PIC, "1", PIC), says("ok"), user(PIC, "2")) == (
        "USER: {0}\n{1}\n1 ASSISTANT: ok USER: {2}\n2 ASSISTANT:"
    )


@pytest.mark.parametrize("name", [*LIST_TEMPLATES, *STRING_TEMPLATES])
def test_as_many_literals_as_pictures_are_their_places(name: str) -> None:
    source = (LIST_TEMPLATES | STRING_TEMPLATES)[name]
    prompt = shown(source, user(PIC, "A <image> B <image>", PIC))
    assert "A {0} B {1}" in prompt
    assert prompt.count("{") == 2 and "<image>" not in prompt


@pytest.mark.parametrize("name", [*LIST_TEMPLATES, *STRING_TEMPLATES])
@pytest.mark.parametrize("words", ["A <image> B <image>", "<image><image><image>"])
def test_other_literals_are_text(name: str, words: str) -> None:
    source = (LIST_TEMPLATES | STRING_TEMPLATES)[name]
    prompt = shown(source, user(PIC, words))
    assert words in prompt and prompt.count("{0}") == 1
    assert words in shown(source, user(words))


def test_literals_count_over_all_turns_then_turn_by_turn() -> None:
    assert shown(VICUNA_TEMPLATE, user(PIC, "a"), says("b"), user("<image>c")) == (
        "USER: a ASSISTANT: b USER: {0}c ASSISTANT:"
    )
    assert shown(VICUNA_TEMPLATE, user(PIC, "x<image>"), says("b"), user("what is <image>?")) == (
        "USER: x{0} ASSISTANT: b USER: what is <image>? ASSISTANT:"
    )


def test_only_users_place_pictures() -> None:
    assert shown(VICUNA_TEMPLATE, says("<image>", "system"), user(PIC, "a")) == (
        "<image> USER: {0}\na ASSISTANT:"
    )


def test_unplaced_picture_is_refused() -> None:
    message = {"role": "assistant", "content": [text("b"), PIC]}
    with pytest.raises(TemplateError, match=r"hold 1 pictures.*places 0"):
        shown(MISTRAL_TEMPLATE, user("a"), message)


def test_generation_prompt_is_optional() -> None:
    assert shown(VICUNA_TEMPLATE, user("a"), add_generation_prompt=False) == "USER: a "


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (VICUNA_TEMPLATE, "USER: a ASSISTANT: It is "),
        (MISTRAL_TEMPLATE, "[INST] a [/INST] It is "),
        (CHATML_STRING_TEMPLATE, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nIt is "),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
            "user: a\nassistant: It is",
        ),
    ],
)
def test_final_message_is_continued(source: str, expected: str) -> None:
    assert shown(source, user("a"), says("It is "), continue_final_message=True) == expected


def test_picture_alone_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="no text"):
        shown(VICUNA_TEMPLATE, user(PIC), continue_final_message=True)


def test_swallowed_final_message_cannot_be_continued() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match="final message"):
        shown(source, user("a"), says("b"), continue_final_message=True)


def test_text_for_people_holds_the_image_token() -> None:
    template = ChatTemplate(VICUNA_TEMPLATE, TOKENS)
    assert template.text(template.render([user(PIC, "a")])) == "USER: <image>\na ASSISTANT:"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "a"}],
        [{"role": 3, "content": "a"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "a", "name": object()}],
    ],
)
def test_malformed_messages_are_refused(messages: list[Any]) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(VICUNA_TEMPLATE).render(messages)


def test_tool_calls_reach_the_template() -> None:
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "ü"}}]}
    assert shown(source, user("a"), call) == 'a{"name": "ü"}'


# --- against transformers ------------------------------------------------------------------------

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user(text("Hi"))],
    [user({"type": "image"}, "What is shown?")],
    [user("What is shown?", {"type": "image"}), {"role": "assistant", "content": [text("A cat.")]}],
    [
        {"role": "system", "content": [text("Be short.")]},
        user({"type": "image"}, "One", {"type": "image"}, " two"),
        {"role": "assistant", "content": [text("ok")]},
        user({"type": "image"}, "Three"),
    ],
]


@pytest.mark.parametrize("kind", ["next-mistral", "next-vicuna", "next-yi", "llava15"])
def test_text_and_ids_equal_transformers(checkpoint: Checkpoint, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(checkpoint(kind))
    template = ChatTemplate.from_folder(checkpoint(kind))
    tokenizer = Tokenizer.from_folder(checkpoint(kind))
    assert template is not None
    for conversation in CONVERSATIONS:
        for prompt in (True, False):
            expected = processor.apply_chat_template(conversation, add_generation_prompt=prompt)
            parts = template.render(conversation, add_generation_prompt=prompt)
            assert template.text(parts) == expected
            ids = tokenizer.encode_parts(parts, template.wants_special_tokens(parts))
            assert ids == processor.tokenizer(expected)["input_ids"]


@pytest.mark.parametrize("source", [LLAMA2_TEMPLATE, CHATML_STRING_TEMPLATE, VICUNA_TEMPLATE])
def test_features_of_jinja_equal_transformers(source: str) -> None:
    oracle = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    extra = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}"
        "{% if loop.last %}{{ ns.n ~ '-' ~ loop.length ~ loop.previtem.role }}{% endif %}"
        "{% endfor %}\n   {% for k, v in dict(a=1, b=[2, {'x': 'ü<'}]).items() %}\n"
        "  {{ k }}{{ v | tojson }}{{ v | tojson(indent=2) }}\n   {%- endfor %}\n"
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i * '=' }}{% endfor %}"
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a' + 'b') }}{{ strftime_now('%Y') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}"
        "{% for m in messages | rejectattr('role', 'equalto', 'user') %}{{ m.role }}{% endfor %}"
        "{% for x in nothing %}{{ x }}{% else %}none{% endfor %}"
    )
    messages = [user(text("Hi")), {"role": "assistant", "content": [text("Ho")]}]
    template = ChatTemplate(source + extra, TOKENS)
    given = messages if template.wants_lists else [user("Hi"), says("Ho")]
    (expected,), _ = oracle(
        [given], chat_template=source + extra, add_generation_prompt=True, **TOKENS
    )
    assert template.text(template.render(messages)) == expected


# --- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "refuses"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}", "sandbox forbids|refuses"),
        ("{% set x = messages.append(1) %}", "sandbox forbids|refuses"),
        ("{{ cycler.__init__.__globals__ }}", "sandbox forbids|refuses"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "sandbox forbids"),
        ("{{ namespace(_x=1) }}", "sandbox forbids"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% for a in range(999999999) %}{% endfor %}", "cannot be rendered"),
        ("{{ 'x' * 999999999 }}", "characters"),
        ("{{ 999999999 * 'x' }}", "characters"),
        ("{{ 9 ** 999999999 }}", "sandbox forbids"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}"
            "{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}",
            "characters",
        ),
        ("{% for i in range(900) %}{{ 'x' * 99999 }}{% endfor %}", "characters"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "cannot be rendered"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "cannot be rendered"),
    ],
)
def test_failing_and_endless_templates_are_stopped(source: str, message: str) -> None:
    template = ChatTemplate(source)
    start = time.monotonic()
    with pytest.raises(TemplateError, match=message) as caught:
        template.render([user("a secret")])
    assert time.monotonic() - start < 8
    assert len(str(caught.value)) < 300 and "secret" not in str(caught.value)


def test_rendering_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.setattr("tessera.router.template_sandbox.MAX_SECONDS", -1.0)
    with pytest.raises(TemplateError, match="longer than"):
        template.render([user("a")])


@pytest.mark.parametrize("source", ["{% for %}", "{{ a", "{% nonsense %}", "{% generation %}"])
def test_syntax_errors_are_refused_when_loading(source: str) -> None:
    with pytest.raises(TemplateError, match="line 1"):
        ChatTemplate(source)


# --- files ---------------------------------------------------------------------------------------


def model_folder(path: Path, kind: str = "llama") -> Path:
    """A checkpoint's folder with no template in it."""
    checkpoints.make(kind, path)
    for name in ("chat_template.json", "processor_config.json"):
        (path / name).unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    checkpoints.write_json(path / "tokenizer_config.json", config)
    return path


def extend(path: Path, **values: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    checkpoints.write_json(path, old | values)


def printed(folder: Path, *args: Any, **options: Any) -> str:
    template = ChatTemplate.from_folder(folder, *args, **options)
    assert template is not None
    return template.text(template.render([user("a")]))


def test_sources_in_order(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert ChatTemplate.from_folder(folder) is None
    extend(folder / "processor_config.json", chat_template="processor")
    assert printed(folder) == "processor"
    extend(folder / "tokenizer_config.json", chat_template="tokenizer {{ bos_token }}")
    assert printed(folder) == "tokenizer <s>"
    extend(folder / "chat_template.json", chat_template="json")
    assert printed(folder) == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert printed(folder) == "jinja"
    other = tmp_path / "other.json"
    extend(other, bos_token="<b>")
    assert printed(folder, other) == "jinja"
    extend(other, chat_template="other {{ bos_token }}")
    assert printed(folder, other) == "other <b>"
    assert printed(folder, other, override="mine {{ bos_token }}") == "mine <b>"


@pytest.mark.parametrize("name", ["mine.jinja", "mine.txt", "mine.json"])
def test_a_given_template_may_be_a_file(tmp_path: Path, name: str) -> None:
    folder, path = model_folder(tmp_path / "model"), tmp_path / name
    content = "given {{ bos_token }}"
    path.write_text(json.dumps({"chat_template": content}) if name == "mine.json" else content)
    extend(folder / "tokenizer_config.json", bos_token="<s>", chat_template="the model's")
    assert printed(folder, override=str(path)) == "given <s>"


def test_a_given_template_that_is_none_is_named(tmp_path: Path) -> None:
    folder, empty = model_folder(tmp_path / "model"), tmp_path / "empty.json"
    empty.write_text("{}")
    for given, message in [
        (str(empty), "no chat_template"),
        (str(tmp_path / "absent.jinja"), "cannot be read"),
        ("{% for %}", "CHAT_TEMPLATE: .*line 1"),
    ]:
        with pytest.raises(ModelFilesError, match=message):
            ChatTemplate.from_folder(folder, override=given)


def test_roles_the_template_does_not_know_have_older_names() -> None:
    source = "{% for m in messages %}{{ m.role }} {% endfor %}"
    roles = [{"role": role, "content": "x"} for role in ("developer", "function", "tool", "user")]
    assert shown(source, *roles) == "system tool tool user "
    knows = source + "{# #}{% if messages[0].role == 'developer' %}!{% endif %}"
    assert shown(knows, *roles) == "developer tool tool user !"


def test_default_of_named_templates_counts(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    extend(folder / "tokenizer_config.json", chat_template=named)
    assert printed(folder) == "plain"
    extend(folder / "tokenizer_config.json", chat_template=named[:1])
    assert ChatTemplate.from_folder(folder) is None


@pytest.mark.parametrize("template", ["{% for %}", 3, ["x"]])
def test_damaged_templates_of_a_model_are_named(tmp_path: Path, template: Any) -> None:
    folder = model_folder(tmp_path / "model")
    extend(folder / "tokenizer_config.json", chat_template=template)
    if template == ["x"]:
        assert ChatTemplate.from_folder(folder) is None
    else:
        with pytest.raises(ModelFilesError, match=r"chat.template"):
            ChatTemplate.from_folder(folder)


def test_other_image_tokens_of_a_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "next-mistral")
    extend(folder / "processor_config.json", image_token="[IMG]")
    extend(
        folder / "chat_template.json", chat_template=MISTRAL_TEMPLATE.replace("<image>", "[IMG]")
    )
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    parts = template.render([user(PIC, "a <image> [IMG]")])
    assert parts == ["[INST] a ", 0, " [IMG] [/INST]"]
    assert template.text(template.render([user(PIC, "a")])) == "[INST] [IMG]\na [/INST]"


def test_special_tokens_of_the_tokenizer_are_wanted_as_in_transformers(
    checkpoint: Checkpoint,
) -> None:
    vision = ChatTemplate.from_folder(checkpoint("next-mistral"))
    own = ChatTemplate.from_folder(checkpoint("next-mistral"), override="{{ bos_token }}x")
    words = ChatTemplate.from_folder(checkpoint("llama"))
    assert vision is not None and own is not None and words is not None
    assert vision.wants_special_tokens(vision.render([user("a")]))
    assert not own.wants_special_tokens(own.render([user("a")]))
    assert not words.wants_special_tokens(words.render([user("a")]))
