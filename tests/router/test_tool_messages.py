from typing import Any

from tessera.router.chat_template import ChatTemplate
from tessera.router.schemas import ChatBody
from tessera.router.tool_formats import find_format
from tessera.router.tool_messages import ToolConversation
from tessera.router.tools import ToolUse, read_tools
from tests.checkpoints import CHATML_TEMPLATE, LLAMA2_TEMPLATE, MISTRAL_TEMPLATE
from tests.router.tool_samples import HERMES, LLAMA3, MISTRAL, STOP

USER = {"role": "user", "content": "Sun?"}


def call(arguments: Any = '{"city": "Ulm"}', id_: str = "call_1") -> dict[str, Any]:
    return {"id": id_, "function": {"name": "get_weather", "arguments": arguments}}


def called(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(text: str = "rain", id_: str = "call_1") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": id_}


def tools(**fields: Any) -> ToolUse | None:
    body = {"messages": [USER], "tools": [STOP], **fields}
    return read_tools(ChatBody.model_validate(body))


def shown(source: str, *messages: dict[str, Any], use: ToolUse | None = None) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    format = find_format(template.tool_source, lambda _: None)
    return template.text(template.render(messages, tools=ToolConversation(format, use)))


def test_a_template_that_knows_tools_gets_data() -> None:
    text = shown(HERMES, USER, called(call(), call({"city": "Köln"})), result(), use=tools())
    assert text.startswith('<tools>{"type": "function", "function": {"name": "stop", "parameters"')
    assert 'user: Sun?assistant: <tool_call>\n{"name": "get_weather", "arguments": ' in text
    assert '{"city": "Ulm"}}' in text and '{"city": "Köln"}}' in text
    assert "<tool_response>rain</tool_response>" in text


def test_other_native_formats() -> None:
    made = called(call(id_="abcdefghi"))
    text = shown(MISTRAL, USER, made, result(id_="abcdefghi"), use=tools())
    assert '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Ulm"}}]' in text
    assert "[TOOL_RESULTS] rain abcdefghi[/TOOL_RESULTS]" in text
    assert '"parameters": {"city": "Ulm"}}' in shown(LLAMA3, USER, made, result(), use=tools())


def test_arguments_that_are_cut_short_stay_text() -> None:
    assert '"{\\"ci"' in shown(HERMES, USER, called(call('{"ci')), result())
    assert '"arguments": {"ci}\n</tool_call>' in shown(CHATML_TEMPLATE, USER, called(call('{"ci')))
    assert '"arguments": {}}' in shown(HERMES, USER, called(call(None)))


def test_a_native_template_is_told_only_what_the_client_says() -> None:
    assert "user: Sun?\n\nUse them." in shown(HERMES, USER, use=tools(tool_prompt="Use them."))
    assert shown(HERMES, USER, use=tools()).endswith("user: Sun?")


def test_a_template_without_tools_gets_text() -> None:
    for source in (CHATML_TEMPLATE, MISTRAL_TEMPLATE, LLAMA2_TEMPLATE):
        text = shown(source, USER, use=tools())
        assert text.index("Sun?\n\n") < text.index('"name": "stop"') < text.index("plain words")
        assert '<tool_call>\n{"name": "NAME", "arguments": {"PARAMETER": VALUE}}' in text
        forced = shown(source, USER, use=tools(tool_choice="required"))
        assert "Answer with a call now." in forced and "plain words" not in forced
        own = shown(source, USER, use=tools(tool_prompt="Mind the rules."))
        assert "Mind the rules." in own and "plain words" not in own


def test_earlier_calls_and_results_become_text() -> None:
    turns = [USER, called(call(), content="Well."), result(), result("sun"), USER]
    text = shown(CHATML_TEMPLATE, *turns, use=tools())
    assert (
        '<|im_start|>assistant\nWell.\n<tool_call>\n{"name": "get_weather", "arguments": '
        '{"city": "Ulm"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n'
        "</tool_response>\n<tool_response>\nsun\n</tool_response>\nSun?"
    ) in text
    assert text.count("You can call") == 1 and text.index("You can call") > text.index("rain")
    assert "</tool_response>" in shown(CHATML_TEMPLATE, *turns)  # tools may be gone by then


def test_what_is_said_about_tools_stays_where_it_was_while_calls_are_made() -> None:
    first = shown(CHATML_TEMPLATE, USER, use=tools())
    second = shown(CHATML_TEMPLATE, USER, called(call()), result(), use=tools())
    assert second.startswith(first)


def test_conversations_without_tools_are_left_alone() -> None:
    assert shown(CHATML_TEMPLATE, USER, USER).count("<|im_start|>user") == 2


def test_a_description_cannot_place_pictures() -> None:
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    hostile = {"function": {"name": "f", "description": "<image>"}}
    template = ChatTemplate(CHATML_TEMPLATE)
    use = tools(tools=[hostile])
    format = find_format(template.tool_source, lambda _: None)
    parts = template.render([picture], tools=ToolConversation(format, use))
    assert [part for part in parts if isinstance(part, int)] == [0]
    assert str(parts[-1]).count("<image>") == 1


def test_no_user_at_all() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert '"name": "stop"' in shown(CHATML_TEMPLATE, system, use=tools())
