import json
import random
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel

from tessera.router.detokenizer import MAX_HELD_BYTES, IncrementalDetokenizer
from tessera.router.pieces import PieceKind
from tessera.router.tokenizer import Tokenizer
from tests import checkpoints

KINDS = ("next-mistral", "next-yi", "next-custom", "bytes")
ANY_ID = st.integers(0, 660)
ANY_TEXT = st.text(max_size=30) | st.text("aé€🙂 \n\ufffd", max_size=12)
FEW = settings(max_examples=150, deadline=None)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return Tokenizer(byte_level())
    words = checkpoints.words(kind)
    definition = json.loads(checkpoints.build_tokenizer(kind).to_str())
    return Tokenizer(definition, image_token="<image>", image_token_id=words.image)


def byte_level() -> dict[str, Any]:
    """GPT-2's family: bytes, a few merges (one ends inside a character), added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("â", "Ĥ"), ("Ã", "©"), ("Ġt", "he")]
    tokens = [*alphabet, *(a + b for a, b in merges)]
    backend = Backend(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>")])
    backend.add_tokens(["<tool>", "€uro"])
    definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_parts([text], add_special_tokens=False)


def text_of(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], eager: bool = False
) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, eager=eager)
    return "".join(detokenizer.add(token_id) for token_id in ids) + detokenizer.flush()


def decoded_behind(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """What decoding everything at once adds to the decoded prompt."""
    before, both = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assert both.startswith(before)
    return both[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(ids=st.lists(ANY_ID, max_size=MAX_HELD_BYTES))
def test_random_ids_give_what_decoding_at_once_gives(kind: str, ids: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = encode(tokenizer, "Say it:")
    assert text_of(tokenizer, prompt, ids) == decoded_behind(tokenizer, prompt, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eager", [False, True])
@FEW
@given(text=ANY_TEXT)
def test_texts_come_back(kind: str, eager: bool, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = encode(tokenizer, "Say it:")
    ids = encode(tokenizer, text)
    assert text_of(tokenizer, prompt, ids, eager) == decoded_behind(tokenizer, prompt, ids)
    assert text_of(tokenizer, [], ids, eager) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(ids=st.lists(ANY_ID, max_size=MAX_HELD_BYTES))
def test_without_a_prompt_the_text_begins_as_decoded_text_does(kind: str, ids: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    assert text_of(tokenizer, [], ids) == tokenizer.decode(ids)
    only_specials = [i for i in (0, 1, 2) if tokenizer.is_special(i)]
    assert text_of(tokenizer, only_specials, ids) == tokenizer.decode(only_specials + ids)


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(ids=st.lists(ANY_ID, max_size=60))
def test_token_texts_keep_specials_and_lose_no_text(kind: str, ids: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    detokenizer = IncrementalDetokenizer(tokenizer, encode(tokenizer, "x"), eager=True)
    shown = ""
    for token_id in ids:
        piece = detokenizer.token_text_in_context(token_id)
        if tokenizer.is_special(token_id):
            assert piece.endswith(tokenizer.token_text(token_id))
        shown += piece
    names = [tokenizer.token_text(i) for i in ids if tokenizer.is_special(i)]
    for name in names:
        _, found, shown = shown.partition(name)
        assert found


def test_next_word_begins_with_its_space() -> None:
    tokenizer = tokenizer_of("next-mistral")
    detokenizer = IncrementalDetokenizer(tokenizer, encode(tokenizer, "What"))
    (the,) = encode(tokenizer, "the")
    assert detokenizer.add(the) == " the"
    assert detokenizer.token_text_in_context(the) == " the"


def test_first_word_of_all_loses_its_space() -> None:
    tokenizer = tokenizer_of("next-mistral")
    detokenizer = IncrementalDetokenizer(tokenizer, [1])
    (the,) = encode(tokenizer, "the")
    assert [detokenizer.add(the), detokenizer.add(the)] == ["the", " the"]


def test_specials_show_in_token_text_only() -> None:
    tokenizer = tokenizer_of("next-mistral")
    detokenizer = IncrementalDetokenizer(tokenizer, [1, 300])
    assert detokenizer.add(2) == ""
    assert detokenizer.token_text_in_context(2) == "</s>"
    assert detokenizer.token_text_in_context(600) == "<image>"


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]
    return [token_id for token_id in ids if token_id is not None]


def test_bytes_of_a_character_show_with_the_last_one() -> None:
    tokenizer = tokenizer_of("next-mistral")
    ids = byte_tokens(tokenizer, "€".encode())
    eager = IncrementalDetokenizer(tokenizer, [300], eager=True)
    assert [eager.add(token_id) for token_id in ids] == ["", "", "€"]
    assert [eager.token_text_in_context(token_id) for token_id in ids] == ["", "", "€"]
    patient = IncrementalDetokenizer(tokenizer, [300])
    (the,) = encode(tokenizer, "the")
    assert [patient.add(token_id) for token_id in [*ids, the]] == ["", "", "", "€ the"]


def test_line_break_shows_at_once_when_eager() -> None:
    tokenizer = tokenizer_of("next-mistral")
    detokenizer = IncrementalDetokenizer(tokenizer, [300], eager=True)
    assert detokenizer.add(byte_tokens(tokenizer, b"\n")[0]) == "\n"


def test_eager_keeps_characters_before_an_invalid_byte() -> None:
    tokenizer = tokenizer_of("next-mistral")
    ids = byte_tokens(tokenizer, b"A\xffB")
    assert text_of(tokenizer, [300], ids) == "\ufffd\ufffd\ufffd"  # as decoding at once
    assert text_of(tokenizer, [300], ids, eager=True) == "A\ufffd\ufffd"


def test_long_runs_of_bytes_do_not_wait_for_their_end() -> None:
    tokenizer = tokenizer_of("next-mistral")
    text = "ကြက်သွန်" * 10
    ids = byte_tokens(tokenizer, text.encode())
    detokenizer = IncrementalDetokenizer(tokenizer, [300])
    waiting, shown = 0, ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.add(token_id)
        waiting = max(waiting, count - len(shown.encode()))
    assert waiting < MAX_HELD_BYTES + 4
    assert shown + detokenizer.flush() == text


def test_endless_invalid_bytes_are_shown() -> None:
    tokenizer = tokenizer_of("next-mistral")
    ids = byte_tokens(tokenizer, b"\xff" * 200)
    assert text_of(tokenizer, [300], ids) == tokenizer.decode(ids) == "\ufffd" * 200


@pytest.mark.parametrize("kind", KINDS)
def test_end_inside_a_character_is_shown_as_replacement(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = encode(tokenizer, "a 🙂")[:-1]
    prompt = encode(tokenizer, "b")
    text = text_of(tokenizer, prompt, ids)
    assert text == decoded_behind(tokenizer, prompt, ids)
    assert text.endswith("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
def test_time_per_token_does_not_grow(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    draw = random.Random(0)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(60_000)]
    start = time.process_time()
    text_of(tokenizer, [1] * 3000, ids)
    assert time.process_time() - start < 3


class TestOtherDecoders:
    def metaspace(self) -> Tokenizer:
        words = ["<unk>", "▁hello", "▁world", "!", "▁", "s"]
        backend = Backend(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.decoder = decoders.Metaspace()
        return Tokenizer(json.loads(backend.to_str()))

    def word_pieces(self) -> Tokenizer:
        words = ["[UNK]", "play", "##ing", "##ed", "ball", ",", "\ufffd"]
        backend = Backend(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece(cleanup=False)
        return Tokenizer(json.loads(backend.to_str()))

    @pytest.mark.parametrize("make", ["metaspace", "word_pieces"])
    @FEW
    @given(ids=st.lists(st.integers(1, 6), max_size=40))
    def test_random_ids(self, make: str, ids: list[int]) -> None:
        tokenizer: Tokenizer = getattr(self, make)()
        assert tokenizer.kind is PieceKind.OTHER
        assert text_of(tokenizer, [1], ids) == decoded_behind(tokenizer, [1], ids)
        assert text_of(tokenizer, [], ids) == tokenizer.decode(ids)
