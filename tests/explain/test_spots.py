"""Tokens in context: whole characters, one line, nothing that a terminal would act on."""

from __future__ import annotations

import numpy as np

from hf_neuronselect.explain.spots import Spot, one_line, spot_at, spots_of
from hf_neuronselect.signals.heat import TokenValues


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_a_token_is_shown_in_its_context() -> None:
    ids = np.frombuffer(b"one two three", np.uint8).astype(np.int64)
    spot = spot_at(decode, ids, 4, 1.5)
    assert (spot.before, spot.token, spot.after) == ("one ", "t", "wo t") and str(spot) == "one [t]wo t"
    assert str(spot_at(decode, ids[:1], 0, 1.0)) == "[o]"


def test_parts_of_a_character_are_shown_with_the_rest_of_it() -> None:
    ids = np.frombuffer("né☃x".encode(), np.uint8).astype(np.int64)
    assert {spot_at(decode, ids, at, 1.0).token for at in range(3, 6)} == {"☃"}
    broken = np.asarray([0xFF])
    assert spot_at(decode, broken, 0, 1.0).token == "\ufffd"


def test_the_strongest_tokens_first_each_word_once() -> None:
    ids = np.frombuffer(b"abAc", np.uint8).astype(np.int64)
    values = TokenValues(ids, np.arange(4), np.asarray([[1.0], [0.0], [3.0], [2.0]]))
    assert [(spot.token, spot.value) for spot in spots_of(decode, values, 0)] == [("A", 3.0), ("c", 2.0)]
    assert [spot.row for spot in spots_of(decode, values, 0, top=1, row=7)] == [7]


def test_hostile_text_is_escaped() -> None:
    text = "\x1b[31mred\x1b[0m\u202eabc\x07"
    for told in (str(Spot(text, text, text, 1.0)), one_line(text), one_line(f"a\r\n{text}")):
        assert not set(told) & set("\x1b\x07\u202e\n\r") and "\\x1b[31m" in told
    assert str(Spot("a\n", "\t", "\r\nb", 1.0)) == "a⏎[⇥]⏎b"
    assert len(one_line("x" * 1_000_000)) < 100 and len(str(Spot("y" * 10_000, "x" * 10_000, "z" * 10_000, 1.0))) < 200
