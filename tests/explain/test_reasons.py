"""Texts with what their tokens add: nothing is lost, nothing is added, and turns are found in what the model reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_neuronselect.explain.explanation import Part
from hf_neuronselect.explain.labels import Label
from hf_neuronselect.explain.page_data import embedded
from hf_neuronselect.explain.reasons import (
    AS_READ,
    MOST_BYTES,
    MOST_TOKENS,
    Reasons,
    heat_of,
    levels_of,
    pieces_of,
    reasons_data,
    spans_of,
    word_heat,
)
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.heat import TokenValues

HOSTILE = "</script><b>\x1b[31m\u202eevil\0 مرحبا ☃"


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def dropping(ids: list[int]) -> str:
    """Like tokenizers that mark a word's beginning and drop the space where a text begins."""
    return decode(ids).removeprefix(" ")


def tokens_of(text: str, columns: int = 1, seed: int = 0) -> TokenValues:
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return TokenValues(ids, np.arange(len(ids)), np.random.default_rng(seed).normal(size=(len(ids), columns)))


@given(st.text(min_size=1, max_size=60))
def test_pieces_make_up_the_text(text: str) -> None:
    ids = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)
    starts, pieces = pieces_of(decode, ids)
    assert "".join(pieces) == decode(ids.tolist()) and starts[0] == 0 and (np.diff(starts) > 0).all()
    assert "".join(pieces_of(dropping, ids)[1]) == dropping(ids.tolist())


def test_bytes_of_a_character_are_one_piece_and_broken_ones_stay() -> None:
    assert pieces_of(decode, np.frombuffer("a☃é".encode(), np.uint8))[1] == ["a", "☃", "é"]
    assert pieces_of(decode, np.asarray([0xFF, 0x61]))[1] == ["\ufffd", "a"]


READ = "<s>user\nfirst words\n<s>assistant\nsecond words\n</s>"


@pytest.mark.parametrize(
    ("text", "parts", "found"),
    [
        (READ, ["first words", "second words"], ["first words", "second words"]),
        (READ, ["  first words \n", "second words"], ["first words", "second words"]),  # templates strip turns
        (READ[:-9], ["first words", "second words", "third"], ["first words", "second w", ""]),  # cut off
        (READ, ["first words", "", "second words"], ["first words", "", "second words"]),
        (READ, ["second words", "first words of a text that is not there"], ["second words", ""]),  # cannot be told
        (READ * 3, ["FIRST WORDS", "x"], None),  # written otherwise
        ("", ["a"], [""]),
    ],
)
def test_turns_are_found_in_what_the_model_reads(text: str, parts: list[str], found: list[str] | None) -> None:
    spans = spans_of(text, parts)
    assert (spans if spans is None else [text[slice(*span)] for span in spans]) == found


def test_what_tokens_add_is_neither_lost_nor_doubled() -> None:
    said = Conversation([{"role": "user", "content": "first words"}, {"role": "assistant", "content": "second words"}])
    tokens = tokens_of(READ, columns=3)
    heat = heat_of(decode, tokens, said)
    assert [(role, "".join(pieces)) for role, pieces in heat.turns] == [
        ("user", "first words"),
        ("assistant", "second words"),
    ]
    inside = np.concatenate(
        [np.arange(READ.index(one), READ.index(one) + len(one)) for one in ("first words", "second words")]
    )
    assert np.array_equal(heat.values, tokens.values[inside, 0]) and np.array_equal(
        heat.parts, tokens.values[inside, 1:]
    )
    every = np.abs(tokens.values[:, 0])
    assert heat.outside == pytest.approx(1 - every[inside].sum() / every.sum()) and heat.whole


def test_a_text_written_otherwise_is_shown_as_it_is_read() -> None:
    said = Conversation([{"role": "user", "content": "FIRST WORDS AND MANY MORE"}])
    text = READ * 3
    heat = heat_of(decode, tokens_of(text), said)
    assert [(role, "".join(pieces)) for role, pieces in heat.turns] == [
        (AS_READ, text)
    ] and heat.outside == pytest.approx(0)


def test_long_rows_are_cut_and_it_is_said() -> None:
    text = "word " * 20_000
    heat = heat_of(decode, tokens_of(text), Conversation(text=text))
    assert sum(len(pieces) for _, pieces in heat.turns) == MOST_TOKENS and not heat.whole and heat.outside > 0.5
    wide = heat_of(lambda ids: "漢" * 500 * len(ids), tokens_of("x" * 90), Conversation(text="漢" * 45_000))
    assert len(embedded([pieces for _, pieces in wide.turns])) < 2 * MOST_BYTES and not wide.whole
    words = word_heat(Conversation(text=text), {"word": 2.0})
    assert (
        words.values.sum() == pytest.approx(2.0) and not words.whole and len(json.dumps(words.turns)) < 2 * MOST_BYTES
    )


def test_a_row_of_one_token() -> None:
    heat = heat_of(decode, tokens_of("a"), Conversation(text="a"))
    assert heat.turns == (("text", ("a",)),) and len(heat.values) == 1 and heat.outside == 0 and heat.whole
    silent = heat_of(
        decode, TokenValues(np.asarray([97]), np.zeros(0, np.int64), np.zeros((0, 1))), Conversation(text="a")
    )
    assert silent.values.tolist() == [0.0] and silent.outside == 0 and levels_of(silent.values) == "0"


def test_words_share_what_they_add() -> None:
    said = Conversation([{"role": "user", "content": "Apples and apples"}, {"role": "assistant", "content": "pears"}])
    heat = word_heat(said, {"apples": 3.0, "pears": -1.0, "figs": 1.0})
    assert heat.values.tolist() == [1.5, 0, 0, 0, 1.5, -1.0] and heat.outside == pytest.approx(1 / 5)


def test_shades() -> None:
    assert levels_of(np.asarray([0.0, 1.0, 4.0, -4.0, -0.1])) == "016f0"
    assert levels_of(np.zeros(3)) == "000" and levels_of(np.asarray([np.nan, 1.0])) == "00"


def test_what_reaches_the_page_is_safe() -> None:
    heat = heat_of(decode, tokens_of(HOSTILE, 2), Conversation(text=HOSTILE))
    label = Label((HOSTILE,), (), (), 0.71828, 0.1, 0.1)
    parts = (Part(HOSTILE, "word", None, 2.0, 0.5, {}), Part("feature 3", "feature", 3, 1.0, 0.25, {}, label=label))
    roles = {"user": 0}
    data = reasons_data(Reasons("t", HOSTILE, parts, 9, heat), roles)
    text = embedded(data)
    assert not set(text) & set("\x1b\0\u202e<") and "☃" in text and roles == {"user": 0, "text": 1}
    assert (
        data["parts"][1]["unit"] == "feature 3"
        and data["parts"][1]["made"] == "made by a machine, AUC 0.72"
        and data["of"] == 9
    )
    assert len(data["levels"]) == len(data["turns"][0][1]) == len(data["parts"][0]["levels"])
    assert data["parts"][1]["levels"] == "" and "turns" not in reasons_data(Reasons("t", "x"), roles)
