"""The text of an answer, token by token: it joins to the tokeniser's own, and stop strings never leak."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_sides import fallback_text, smollm2_text

from tensorway_worker.engines.generation.requests import StopRules
from tensorway_worker.engines.generation.text import TextSide, TextStream

_NO_STOP = StopRules(max_tokens=100)
_LETTERS = st.sampled_from("abcdehlorw \n\u00e9\u00df\u4f60\u597d\u6c34\U0001f600\U0001f468\u200d\U0001f469\U0001f1e9\u0301\ufffd\u0000<|>")
_TEXT = st.one_of(st.text(_LETTERS, max_size=40), st.text(max_size=30))

pytestmark = pytest.mark.models


def _joined(text: TextSide, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    """The pieces, the last of them from the flush."""
    stream = TextStream(text, prompt, _NO_STOP)
    return [*(stream.take(id).text for id in ids), stream.flush()]


def _tokens(text: TextSide, written: str) -> tuple[int, ...]:
    return text.encode(written)


@settings(max_examples=300, deadline=None)
@given(written=_TEXT)
def test_text_joins_and_no_character_is_broken(written: str) -> None:
    text = smollm2_text()
    ids = _tokens(text, written)
    pieces = _joined(text, text.encode("The answer is:"), ids)
    assert "".join(pieces) == text.decode(ids)
    if "\ufffd" not in text.decode(ids):
        assert all("\ufffd" not in piece for piece in pieces)
        assert pieces[-1] == ""


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 300)), max_size=40))
def test_any_ids_join_to_the_text_of_the_whole(ids: list[int]) -> None:
    """Random ids: special tokens, halves of characters, bytes that are no text."""
    text = smollm2_text()
    assert "".join(_joined(text, (1, 2, 3), ids)) == text.decode(ids)


def test_every_token_is_read_as_the_tokeniser_reads_it() -> None:
    text = smollm2_text()
    for id in range(text.vocab_size + 3):
        assert "".join(_joined(text, (), (id,))) == text.decode((id,))


@settings(max_examples=300, deadline=None)
@given(
    written=st.text(st.sampled_from("abcdehlorw  \u00e9\u4f60\U0001f600"), max_size=30),
    prompt=st.sampled_from(["a", "hello a", "\u4f60"]),
)
def test_byte_fallback_is_read_in_the_context_of_the_prompt(written: str, prompt: str) -> None:
    """The tokeniser drops a space at the beginning of a text; an answer does not begin one."""
    text = fallback_text()
    whole = text.encode(prompt + written)
    before = text.encode(prompt)
    if whole[: len(before)] != before:
        return
    pieces = _joined(text, before, whole[len(before) :])
    assert "".join(pieces) == written
    assert all("\ufffd" not in piece for piece in pieces)


def test_byte_fallback_gives_up_bytes_that_are_no_text() -> None:
    text = fallback_text()
    broken = [2 + 0xE4] * 12
    pieces = _joined(text, text.encode("a"), [*broken, *text.encode("hello")])
    assert pieces[0] == ""
    assert "".join(pieces).lstrip("\ufffd") == " hello"
    assert any(pieces[:12])
    assert _joined(text, (), (0, 1, 2 + 0xE4))[-1] == "\ufffd"


def _by_letters(written: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """What stop strings mean, letter by letter: the first that is complete ends the text; of several, the longest."""
    for end in range(1, len(written) + 1):
        complete = [stop for stop in stops if written[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return written[: end if include else end - len(longest)], longest
    return written, None


@settings(max_examples=500, deadline=None)
@given(
    written=st.one_of(st.text(st.sampled_from("ab\n \u4f60\U0001f600"), max_size=30), _TEXT),
    stops=st.lists(st.one_of(st.text(st.sampled_from("ab\n \u4f60\U0001f600"), min_size=1, max_size=5), st.text(min_size=1, max_size=4)),
                   min_size=1, max_size=4, unique=True),
    include=st.booleans(),
)
def test_stop_strings_never_leak(written: str, stops: list[str], include: bool) -> None:
    text = smollm2_text()
    ids = _tokens(text, written)
    stream = TextStream(text, (), StopRules(max_tokens=100, strings=tuple(stops), include_stop=include))
    said, match = "", None
    expected, expected_match = _by_letters(text.decode(ids), stops, include)
    for id in ids:
        piece = stream.take(id)
        said += piece.text
        assert expected.startswith(said)
        match = piece.stop_match
        if match is not None:
            break
    else:
        said += stream.flush()
    assert (said, match) == (expected, expected_match)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 49151), min_size=1, max_size=20), cut=st.integers(0, 20),
    stop=st.sampled_from(["a", "th", "\n", " the"]),
)
def test_a_replayed_stream_goes_on_as_if_nothing_had_happened(ids: list[int], cut: int, stop: str) -> None:
    text = smollm2_text()
    rules = StopRules(max_tokens=100, strings=(stop,))
    first, again = TextStream(text, (), rules), TextStream(text, (), rules)
    before = [first.take(id) for id in ids[:cut]]
    if any(piece.stop_match for piece in before):
        return
    again.replay(ids[:cut])
    assert [first.take(id) for id in ids[cut:]] == [again.take(id) for id in ids[cut:]]
    assert first.flush() == again.flush()


def test_a_stop_string_that_begins_in_the_prompt_does_not_count() -> None:
    text = smollm2_text()
    stream = TextStream(text, text.encode("one END"), StopRules(max_tokens=9, strings=("END OF",)))
    pieces = [stream.take(id) for id in text.encode(" OF it")]
    assert "".join(piece.text for piece in pieces) + stream.flush() == " OF it"


def test_what_may_become_a_stop_string_waits() -> None:
    text = smollm2_text()
    stream = TextStream(text, (), StopRules(max_tokens=9, strings=("\n\nUser:",)))
    newline, = text.encode("\n")
    word, = text.encode("Yes")
    assert stream.take(word).text == "Yes"
    assert stream.take(newline).text == ""
    assert stream.take(newline).text == ""
    assert stream.take(newline).text == "\n"
    assert stream.take(word).text == "\n\nYes"
