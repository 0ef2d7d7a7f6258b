"""Contexts of features, what is asked about them, and what is read in the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.core.intervals import Interval
from hf_neuronselect.core.sae_configs import SaeDescribeConfig
from hf_neuronselect.explain.described import (
    AROUND,
    LONGEST,
    SHOWN,
    Contexts,
    asked_whether,
    context_text,
    contexts_of,
    read_phrase,
    read_yes,
    words_fit,
)
from hf_neuronselect.explain.firings import Firings
from hf_neuronselect.explain.labels import Description, Label, Labels

ROWS, LONG = 60, 80
PHRASE = Description("sums", "some-model", Interval(0.75, 0.5, 0.875), 18)


def firings(**places: list[tuple[int, int, float]]) -> Firings:
    """Rows of ``LONG`` random tokens 1 to 9; ``f3=[(row, token, strength)]`` says where feature 3 fires."""
    token = np.random.default_rng(0).integers(1, 10, ROWS * LONG)
    found = [(row * LONG + at, int(name[1:]), strength) for name, ones in places.items() for row, at, strength in ones]
    place, latent, strength = zip(*sorted(found), strict=True)
    return Firings(
        token, np.arange(ROWS * LONG) // LONG, np.asarray(place), np.asarray(latent), np.asarray(strength, np.float32)
    )


def fires_at(seen: Firings, feature: int) -> dict[int, float]:
    found = zip(seen.place.tolist(), seen.latent.tolist(), seen.strength.tolist(), strict=True)
    return {place: strength for place, latent, strength in found if latent == feature}


def test_held_out_contexts_are_of_other_rows_and_half_of_them_are_silent() -> None:
    seen = firings(f3=[(row, at, row + at / 100) for row in range(40) for at in (3, 40)], f4=[(0, 0, 1.0)])
    made = contexts_of(seen, 3, 20, 0)
    assert isinstance(made, Contexts)
    strength, row_of = fires_at(seen, 3), lambda place: place // LONG
    # shown are the strongest firings, one a row: at 40 in rows 39, 38, ...
    assert made.shown == tuple((39 - i) * LONG + 40 for i in range(SHOWN))
    assert len(made.fires) == 10 and len(made.hard) == 5 and len(made.silent) == 5
    for group in (made.fires, (*made.hard, *made.silent)):
        rows = {row_of(place) for place in group}
        assert len(rows) == len(group) and not rows & {row_of(place) for place in made.shown}
    assert all(place in strength for place in made.fires)
    tokens = {seen.token[place] for place in made.shown}
    for place in (*made.hard, *made.silent):
        near = range(
            max(row_of(place) * LONG, place - AROUND[0]), min(row_of(place) * LONG + LONG, place + AROUND[1] + 1)
        )
        assert not any(one in strength for one in near), "it fires in what is shown as a context without it"
    assert all(seen.token[place] in tokens for place in made.hard)
    # over its range: one of each tenth of the held-out rows by strength
    values = sorted(strength[place] for place in made.fires)
    assert values[0] < 4.5 and values[-1] > 27 and np.diff(values).max() < 7
    assert contexts_of(seen, 3, 20, 0) == made != contexts_of(seen, 3, 20, 1)


def test_a_feature_with_too_few_rows_has_none_and_says_why() -> None:
    every = [(row, at, 1.0) for row in range(ROWS) for at in range(0, LONG, 8)]
    seen = firings(f1=[(row, 5, 1.0) for row in range(7)], f2=every, f5=[(row, 5, 1.0) for row in range(8)])
    assert contexts_of(seen, 1, 20, 0) == "fires in 7 of the 60 rows that were read; 8 are needed"
    assert contexts_of(seen, 9, 20, 0) == "fires in 0 of the 60 rows that were read; 8 are needed"
    assert str(contexts_of(seen, 2, 20, 0)).startswith("fires nearly everywhere: 0 held-out rows")
    few = contexts_of(seen, 5, 20, 0)
    assert isinstance(few, Contexts) and (len(few.shown), len(few.fires), len(few.hard) + len(few.silent)) == (4, 4, 4)


def test_without_look_alikes_all_silent_contexts_are_random() -> None:
    seen = firings(f3=[(row, 5, 1.0) for row in range(30)])
    token = seen.token.copy()
    token[seen.place] = 99
    made = contexts_of(replace(seen, token=token), 3, 20, 0)
    assert isinstance(made, Contexts) and not made.hard and len(made.silent) == 10


def test_a_context_is_marked_once_and_stays_in_its_row() -> None:
    seen = Firings(
        np.asarray([1, 2, 3, 4]), np.asarray([0, 1, 1, 2]), *(np.zeros(0, np.int64),) * 2, np.zeros(0, np.float32)
    )
    texts = {1: "other", 2: "a«b\x1b[1m", 3: "c»d\u202e", 4: "next"}
    assert context_text(seen, 2, lambda ids: "".join(texts[int(i)] for i in ids)) == "a‹b\ufffd[1m«c›d\ufffd»"


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("Sums of numbers", "Sums of numbers"), ('"Sums of numbers."', "Sums of numbers"), ("\n\n**Sums**\nBecause", "Sums"),
        ("<think>Well, sums?\n</think>\n\nSums", "Sums"), ("<think>I cannot stop", None), ("", None), ("...\n", None),
        ("\x1b[31mred\x1b[0m \x07bell\u202eturned", "red bellturned"), ("\x1b]8;;http://x\x07link\x1b]8;;\x07", "link"),
        ("a\tb  c\x00", "a b c"), ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("x" * 80, "x" * (LONGEST - 1) + "…"), ("Zahlen über Größe", "Zahlen über Größe"),
    ],
)  # fmt: skip
def test_a_phrase_is_one_line_of_plain_characters(answer: str, phrase: str | None) -> None:
    assert read_phrase(answer) == phrase and len(phrase or "") <= LONGEST


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("yes", True), ("No.", False), ("**Yes**, since", True), ("No, and it is not", False), ("<think>no</think> YES", True),
        ("yes or no", None), ("Yes/No", None), ("nothing", None), ("", None), ("Perhaps yes", None), ("<think>yes", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_where_an_answer_begins(answer: str, says: bool | None) -> None:
    assert read_yes(answer) is says


def test_texts_are_put_into_a_question_as_they_are() -> None:
    (turn,) = asked_whether("{0} phrase", "{context} «x» \\1")
    assert "{0} phrase" in turn["content"] and "<text>\n{context} «x» \\1\n</text>" in turn["content"]


def test_words_fit_where_they_say() -> None:
    seen = Firings(
        np.asarray([1, 2, 3, 1]), np.asarray([0, 0, 0, 1]), *(np.zeros(0, np.int64),) * 2, np.zeros(0, np.float32)
    )
    terms = ["", "one", "two", "three"]

    def places(on: str = "", after: str = "", before: str = "") -> list[int]:
        label = Label(*(tuple(filter(None, [word])) for word in (on, after, before)), 0.9, 0.1, 0.1)
        return [place for place in range(4) if words_fit(label, terms, seen, place)]

    assert places(on="one") == [0, 3] and places(after="one") == [1] and places(before="three") == [1]
    assert places(before="one") == [], "the next row's first word is not beside this row's last"


# ------------------------------------------------------------------------------------------------ labels
def test_a_description_is_kept_and_told_in_the_place_of_the_words(tmp_path: Path) -> None:
    words = Label(("two",), (), (), 0.875, 0.125, 0.25)
    bare = Label((), (), (), None, 0.5, 0.75, replace(PHRASE, score=Interval(None)))
    labels = Labels({1: words, 2: replace(words, described=PHRASE), 3: bare}, {"sae": "x"})
    labels.save(tmp_path / "labels.parquet")
    again = Labels.load(tmp_path / "labels.parquet")
    assert again.found[2] == labels.found[2] and again.found[3] == bare and again.found[1].described is None
    assert [str(again.found[i]) for i in (1, 2, 3)] == ["“two”", "sums", "sums"] and again.found[2].words == "“two”"
    assert [again.found[i].made for i in (1, 2, 3)] == [
        "made by a machine, AUC 0.88",
        "made by the chat model some-model, balanced accuracy 0.75 (0.50 to 0.88)",
        "made by the chat model some-model, not scored",
    ]
    assert [again.found[i].score for i in (2, 3)] == [0.75, None]


def test_new_words_leave_descriptions_and_new_descriptions_leave_words() -> None:
    old = Labels({1: Label(("old",), (), (), 0.9, 0.1, 0.2, PHRASE), 2: Label(("gone",), (), (), 0.8, 0.1, 0.2, PHRASE),
                  3: Label(("undescribed",), (), (), 0.8, 0.1, 0.2)})  # fmt: skip
    new = Labels({1: Label(("new",), (), (), 0.6, 0.3, 0.4)}, {"sae": "x"}).with_descriptions(old.found)
    assert new.found[1] == Label(("new",), (), (), 0.6, 0.3, 0.4, PHRASE) and new.about == {"sae": "x"}
    assert new.found[2] == Label((), (), (), None, 0.1, 0.2, PHRASE) and 3 not in new.found


# ----------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of --features and --selection"), ({"features": "1", "selection": "s"}, "give one of --features and --selection"),
        ({"features": "1,x"}, "features='x': must be numbers of features with commas"), ({"features": "-1"}, "features='-1': must be"),
        ({"features": ""}, "features='': must be numbers"), ({"features": "1,,2"}, "features='': must be"), ({"features": "1.5"}, "features='1.5': must be"),
        ({"features": "1", "most": 3}, "most=3: is for the features of a selection"), ({"features": "1", "contexts": 2}, "contexts"),
        ({"selection": "s", "most": 0}, "most"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(given: dict[str, object], message: str) -> None:
    with pytest.raises(NeuronSelectError, match=message):
        SaeDescribeConfig(pool="p", **given)  # type: ignore[arg-type]


def test_features_are_named_once() -> None:
    assert SaeDescribeConfig(pool="p", features="12, 40,12").numbers == (12, 40)
    assert SaeDescribeConfig(pool="p", selection="s").numbers == ()
