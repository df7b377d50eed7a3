import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.router.stop import StopMatcher


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """Everything shown, and the stop sequence found."""
    matcher = StopMatcher(stops, include)
    shown = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    return shown, matcher.matched


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "found"),
    [
        (["."], ["Hello", " world", ". More"], "Hello world", "."),
        (["STOP"], ["S", "T", "O", "P"], "", "STOP"),
        (["STOP"], ["a ST", "OP b"], "a ", "STOP"),
        (["STOP"], ["xSTOPy"], "x", "STOP"),
        (["STOP"], ["STO", "STOP"], "STO", "STOP"),
        (["\n\n"], ["a\n", "b\n", "\n"], "a\nb", "\n\n"),
        (["aab"], ["aaaab"], "aa", "aab"),
        (["abcabd"], ["abcabcabd"], "abc", "abcabd"),
        (["ab", "b"], ["ab"], "", "ab"),  # both end here: the longer
        (["abcde", "bc"], ["abcde"], "a", "bc"),  # ends first
        (["world", "lo"], ["hello world"], "hel", "lo"),
        (["é🙂"], ["caf", "é", "🙂!"], "caf", "é🙂"),
        (["x"], [], "", None),
        (["xyz"], ["ax", "y"], "axy", None),
        ([], ["anything"], "anything", None),
    ],
)
def test_stops(stops: list[str], pieces: list[str], text: str, found: str | None) -> None:
    assert run(stops, pieces) == (text, found)
    assert run(stops, pieces, include=True) == (text + (found or ""), found)


@pytest.mark.parametrize(
    ("pieces", "text", "found"),
    [
        (["aSTOPb", "c"], "aSTOPbc", None),
        (["aSTOP", "STOP"], "aSTOP", "STOP"),
        (["aSTO", "Pb"], "a", "STOP"),  # it ends behind the first piece
        (["STOPSTO", "P"], "STOP", "STOP"),
        (["STOP", ""], "STOP", None),
    ],
)
def test_what_does_not_count_yet_is_text(pieces: list[str], text: str, found: str | None) -> None:
    first, *others = pieces
    matcher = StopMatcher(["STOP"], include_stop_text=False)
    shown = matcher.feed(first, may_stop=False)
    shown += "".join(matcher.feed(piece) for piece in others) + matcher.flush()
    assert (shown, matcher.matched) == (text, found)


def test_possible_beginning_is_held_back_and_no_more() -> None:
    matcher = StopMatcher(["STOP"], include_stop_text=False)
    assert matcher.feed("abcS") == "abc"
    assert matcher.feed("T") == ""
    assert matcher.feed("x") == "STx"
    assert matcher.feed("ST") == ""
    assert matcher.matched is None
    assert matcher.flush() == "ST"


def test_longest_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["ab", "zzzab"], include_stop_text=False)
    assert matcher.feed("-zzza") == "-"
    assert matcher.feed("b") == ""
    assert matcher.matched == "zzzab"


def test_nothing_follows_a_match() -> None:
    matcher = StopMatcher(["."], include_stop_text=True)
    assert matcher.feed("a.b") == "a."
    assert matcher.feed("c.") == ""
    assert matcher.flush() == ""


def test_empty_stop_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""], include_stop_text=False)


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=6), max_size=12),
    st.booleans(),
)
def test_equals_a_search_in_the_whole_text(
    stops: list[str], pieces: list[str], include: bool
) -> None:
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if ends:
        end, _, found = min(ends)
        expected = text[: end if include else end - len(found)], found
    else:
        expected = text, None
    assert run(stops, pieces, include) == expected
    assert run(stops, [text], include) == expected
    assert run(stops, list(text), include) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abc"))
def test_what_is_shown_never_has_to_be_taken_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops, include_stop_text=False)
    shown = ""
    for character in text:
        shown += matcher.feed(character)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
