"""Streamed text: what is shown was said, stop strings are not, and no character is broken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kvprefetch.engines.load import LoadedModel
from kvprefetch.engines.text import TextStream

MIXED = "Héllo, 漢字 and 🙂👩‍👩‍👧 – naïve “quotes”.\n\tEnd"


@pytest.fixture(scope="module")
def tokenizer(tiny: LoadedModel) -> PreTrainedTokenizerFast:
    return tiny.tokenizer


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, *stop: str) -> list[str]:
    """What is shown after each token, and at the end, if nothing stopped the answer."""
    stream = TextStream(tokenizer, stop)
    shown = []
    for token in tokens_of(tokenizer, text):
        shown.append(stream.push(token))
        if stream.stopped:
            return shown
    return [*shown, stream.flush()]


def test_text_comes_piece_by_piece_and_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = pieces(tokenizer, MIXED)
    assert "".join(shown) == MIXED
    assert len([piece for piece in shown if piece]) > 10


def test_no_piece_holds_a_broken_character(tokenizer: PreTrainedTokenizerFast) -> None:
    assert any(len(tokens_of(tokenizer, character)) > 1 for character in "漢🙂")
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, MIXED))


def test_an_unfinished_character_is_never_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ())
    emoji = tokens_of(tokenizer, "🙂")
    shown = [stream.push(token) for token in (*tokens_of(tokenizer, "ok"), *emoji[:-1])]
    assert "".join(shown) + stream.flush() == "ok"


def test_special_tokens_are_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, "a<|im_end|>b<|im_start|>")) == "ab"


@pytest.mark.parametrize("stop", ["STOP", "\n\n", "漢字", "e fi", "."])
def test_a_stop_string_split_over_tokens_is_never_shown_even_partly(
    tokenizer: PreTrainedTokenizerFast, stop: str
) -> None:
    before, after = "One fish", "and more words"
    text = f"{before}{stop}{after}"
    shown = pieces(tokenizer, text, stop)
    assert "".join(shown) == text[: text.index(stop)]
    for count in range(len(shown)):
        assert text[: text.index(stop)].startswith("".join(shown[:count]))


def test_the_stream_stops_at_the_token_that_completes_the_stop_string(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    tokens = tokens_of(tokenizer, "go on STOP here")
    stopped = []
    for token in tokens:
        stream.push(token)
        stopped.append(stream.stopped)
    done = stopped.index(True) + 1
    assert "STOP" in tokenizer.decode(tokens[:done])
    assert "STOP" not in tokenizer.decode(tokens[: done - 1])
    assert stream.push(tokens[0]) == stream.flush() == ""


def test_the_earliest_of_several_stop_strings_ends_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, "one two three", "three", "two")) == "one "
    assert "".join(pieces(tokenizer, "abcdef", "bcdx", "cd")) == "ab"


def test_of_two_stop_strings_in_one_token_the_earlier_ends_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    word = next(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(set(word)) > 2)
    for stop in ((word[1], word[2]), (word[2], word[1])):
        stream = TextStream(tokenizer, stop)
        assert stream.push(tokenizer.get_vocab()[word]) == word[0]
        assert stream.stopped


def test_a_beginning_that_leads_nowhere_is_shown_in_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    shown = "".join(stream.push(token) for token in tokens_of(tokenizer, "All STO"))
    assert shown == "All "
    assert stream.flush() == "STO"
    assert stream.flush() == ""
    assert "".join(pieces(tokenizer, "STSTOx and SSTO", "STOP")) == "STSTOx and SSTO"


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, ["STOP"])
    assert stream.push(5) == stream.flush() == ""
    assert not stream.stopped


@settings(deadline=None, max_examples=150)
@given(
    text=st.text(st.sampled_from("abSTOP \n漢🙂"), max_size=24), stop=st.text(st.sampled_from("abSTO漢"), max_size=4)
)
def test_any_text_is_shown_up_to_the_stop_string(tiny: LoadedModel, text: str, stop: str) -> None:
    shown = "".join(pieces(tiny.tokenizer, text, *([stop] if stop else [])))
    assert shown == (text.split(stop)[0] if stop else text)


@settings(deadline=None, max_examples=150)
@given(tokens=st.lists(st.integers(0, 511), max_size=40))
def test_any_tokens_can_be_shown_as_they_come(tiny: LoadedModel, tokens: list[int]) -> None:
    """Random bytes, special tokens, and ids beyond the tokenizer's: what a model may draw."""
    stream = TextStream(tiny.tokenizer, ())
    shown = "".join(stream.push(token) for token in tokens) + stream.flush()
    whole = tiny.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.startswith(shown)
    assert set(whole[len(shown) :]) <= {"\ufffd"}, "only unfinished characters stay behind"
