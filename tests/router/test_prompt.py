import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.router.prompt import (
    ImagePart,
    Part,
    TextPart,
    parse_inputs,
)

URI = "data:image/png;base64,iVBORw0K"


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ("What is a pixel?", [TextPart("What is a pixel?")]),
        ("<image>iVBORw0K</image>\nQ", [ImagePart("iVBORw0K"), TextPart("\nQ")]),
        (f"<image>{URI}</image>Q", [ImagePart(URI), TextPart("Q")]),
        ("<image>iVBO\nRw0K\n</image>", [ImagePart("iVBO\nRw0K\n")]),
        (f"User:![]({URI})Why?", [TextPart("User:"), ImagePart(URI), TextPart("Why?")]),
        (f"![a cat]({URI})Why?", [ImagePart(URI), TextPart("Why?")]),
        ("![](http://a.b/c.png)", [ImagePart("http://a.b/c.png")]),
        ("![x](https://a.b/c_(d).png)!", [ImagePart("https://a.b/c_(d).png"), TextPart("!")]),
        ("![](/etc/passwd)", [ImagePart("/etc/passwd")]),
        (f"![]({URI})![]({URI})", [ImagePart(URI), ImagePart(URI)]),
        (f"![]({URI})<image>QUJD</image>", [ImagePart(URI), ImagePart("QUJD")]),
    ],
)
def test_spellings(inputs: str, parts: list[Part]) -> None:
    assert parse_inputs(inputs) == parts


@pytest.mark.parametrize(
    "inputs",
    [
        "[INST] <image>\nWhat is shown? [/INST]",
        "close it with </image> in the end",
        "write ![logo](logo.png) in markdown",
        "![open](",
        "![](never closed",
        "<image>a < b</image>",
        "a![b",
        "![a]b",
        "[a](http://b)",
    ],
)
def test_other_text_stays_text(inputs: str) -> None:
    assert parse_inputs(inputs) == [TextPart(inputs)]


def test_nothing_is_no_part() -> None:
    assert parse_inputs("") == []


def test_first_of_two_openings_is_text() -> None:
    assert parse_inputs("<image> and <image>QUJD</image>") == [
        TextPart("<image> and "),
        ImagePart("QUJD"),
    ]


def test_sources_stay_out_of_representations() -> None:
    assert "QUJD" not in repr(parse_inputs("<image>QUJD</image>"))


@pytest.mark.parametrize(
    "unit",
    [
        "![",
        "![](",
        "![]((",
        "![[",
        "![]()",
        "<image>",
        "<image",
        "![a](b(",
        "!",
        "![](x)(",
        "![\\](",
    ],
)
def test_time_is_linear_in_hostile_prompts(unit: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        start = time.process_time()
        parse_inputs(text)
        return time.process_time() - start

    assert seconds(1_000_000) < 3  # quadratic time would be hours


def test_20_megabytes_of_picture() -> None:
    data = "A" * 20_000_000
    start = time.process_time()
    assert parse_inputs(f"![](data:;base64,{data}) and <image>{data}</image>")[0] == ImagePart(
        f"data:;base64,{data}"
    )
    assert time.process_time() - start < 3


SPELLINGS = ("<image>{}</image>", "![]({})", "![alt text]({})")
WRITTEN = st.one_of(
    st.text(" ab\n![]()>/", min_size=1, max_size=5).filter(lambda text: "![" not in text),
    st.tuples(st.sampled_from(SPELLINGS), st.sampled_from([URI, f"{URI}+/==", "http://a.b/c"])),
)


@given(st.lists(WRITTEN, max_size=12))
def test_written_pictures_are_found_again(pieces: list[str | tuple[str, str]]) -> None:
    inputs, parts, text = "", list[Part](), ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece + "."  # a full stop, lest two texts make markup
            continue
        parts += [TextPart(text), ImagePart(piece[1])] if text else [ImagePart(piece[1])]
        inputs, text = inputs + text + piece[0].format(piece[1]), ""
    assert parse_inputs(inputs + text) == parts + ([TextPart(text)] if text else [])


@given(
    st.lists(
        st.sampled_from(["![", "](", ")", "<image>", "</image>", "data:", "x", "(", "[", "]"]),
        max_size=30,
    ).map("".join)
)
def test_parts_are_pieces_of_the_prompt_in_order(inputs: str) -> None:
    end = 0
    for part in parse_inputs(inputs):
        piece = part.text if isinstance(part, TextPart) else part.source
        end = inputs.index(piece, end) + len(piece)
