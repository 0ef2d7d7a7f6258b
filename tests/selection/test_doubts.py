"""Signs that a selection should not be believed: they are seen where they are there, and only there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect import Method, NeuronSelector, NeuronSelectWarning, register_method
from hf_neuronselect.core.ranks import spearman
from hf_neuronselect.methods import METHODS, make_method
from hf_neuronselect.methods.base import Target
from hf_neuronselect.selection.doubts import (
    MOST_ROWS,
    MOST_SCORES,
    Doubts,
    _join_columns,
    _take_columns,
    _Thinned,
)
from hf_neuronselect.signals.columns import RowBatch


@dataclass(frozen=True)
class Shared(Method):
    """The share of a row's words that an exemplar has, too."""

    name = "shared_words"
    signals = ("text",)

    def fit(self, exemplars: RowBatch) -> Target:
        return {
            "words": np.asarray(sorted({crc32(word.encode()) for text in exemplars["text"] for word in text.split()}))
        }

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        words = set(target["words"].tolist())
        return np.asarray([np.mean([crc32(word.encode()) in words for word in text.split()]) for text in rows["text"]])


class Blind(Shared):
    """A method that sees no target: a row's first letter decides, and the exemplars' are all early ones."""

    name = "blind"

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return np.asarray([float(text[0] not in "abcrgbw") + len(text) % 2 / 9 for text in rows["text"]])


@pytest.fixture
def registered() -> Iterator[None]:
    before = set(METHODS.names())
    for method in (Shared, Blind):
        register_method(method)
    yield
    for name in set(METHODS.names()) - before:
        METHODS.remove(name)


def texts(seed: int, count: int, words: str) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(words.split(), 6)) for _ in range(count)]


POOL = Dataset.from_dict({"text": texts(0, 400, "a b c d e f g h i j k l m n o p")})
TARGET = Dataset.from_dict({"text": texts(1, 16, "red green blue black white")})


def said(method: str, folder: Path) -> tuple[list[str], dict]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selection = NeuronSelector(method).fit({"t": TARGET}).select(POOL, k=5)
    selection.save_pretrained(folder)
    found = [str(one.message) for one in caught if issubclass(one.category, NeuronSelectWarning)]
    return found, json.loads((folder / "selection.json").read_text())["targets"]["t"]


def test_exemplars_that_find_each_other_are_no_reason_to_warn(registered: None, tmp_path: Path) -> None:
    found, record = said("shared_words", tmp_path / "s")
    assert record["hit"] == 1.0 and not record.get("doubts") and not found
    assert "100% score in the pool's best 5 %" in (tmp_path / "s" / "README.md").read_text()


def test_a_method_that_sees_no_target_is_said(registered: None, tmp_path: Path) -> None:
    found, record = said("blind", tmp_path / "s")
    (sentence,) = record["doubts"]
    assert record["hit"] == 0 and "no more than chance" in sentence and found == [f"target t: {sentence}"]
    assert sentence in (tmp_path / "s" / "README.md").read_text()
    assert "no more than chance" in (tmp_path / "s" / "report.html").read_text()


def test_held_out_exemplars_are_not_those_fitted_on(registered: None) -> None:
    """Each half has words of its own, so neither finds the other; fitted on all, every exemplar scores 1."""
    halves = [texts(2, 8, "red green blue"), texts(3, 8, "oak elm ash")]
    mixed = Dataset.from_dict({"text": [text for pair in zip(*halves, strict=True) for text in pair]})
    with pytest.warns(NeuronSelectWarning, match="only 0% of the exemplars .* shared_words does not recognise"):
        selection = NeuronSelector("shared_words").fit({"t": mixed}).select(POOL, k=5)
    assert selection.provenance.targets["t"].hit == 0


def test_scores_of_held_out_exemplars_are_recorded(registered: None) -> None:
    """By hand: the share of an exemplar's words that those at the other parity have."""
    words = [set(text.split()) for text in texts(1, 16, "red green blue black white oak elm")]
    every = Dataset.from_dict({"text": texts(1, 16, "red green blue black white oak elm")})
    known = [set().union(*words[1::2]), set().union(*words[::2])]
    shares = [np.mean([one in known[i % 2] for one in text.split()]) for i, text in enumerate(every["text"])]
    record = NeuronSelector("shared_words").fit({"t": every}).select(POOL, k=5).provenance.targets["t"]
    assert record.held_out == pytest.approx(np.sort(shares)[::-1], rel=1e-5)
    many = Dataset.from_dict({"text": texts(5, 900, "red green blue black white oak elm")})
    record = NeuronSelector("shared_words").fit({"t": many}).select(POOL, k=5).provenance.targets["t"]
    assert len(record.held_out) == 200 and list(record.held_out) == sorted(record.held_out, reverse=True)
    few = NeuronSelector("shared_words").fit({"t": every.select(range(7))}).select(POOL, k=5)
    assert few.provenance.targets["t"].held_out == ()


def test_few_exemplars_and_loaded_capabilities_are_not_judged(registered: None, tmp_path: Path) -> None:
    few = NeuronSelector("shared_words").fit({"t": TARGET.select(range(7))}).select(POOL, k=5)
    NeuronSelector("shared_words").fit({"t": TARGET}).save_pretrained(tmp_path / "cap")
    loaded = NeuronSelector.from_pretrained(tmp_path / "cap").select(POOL, k=5)
    assert few.provenance.targets["t"].hit is None and loaded.provenance.targets["t"].hit is None


def test_scores_that_follow_length() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 500, 300)
    rows = RowBatch(np.arange(300), np.ones(300, bool), {})
    for sign, control in ((1, "longest"), (-1, "shortest")):
        doubts = Doubts(make_method("mona", {}))
        doubts.watch(rows, {"t": sign * np.log(lengths) + 0.05 * draw.normal(size=300)}, lengths)
        (sentence,) = doubts._found({"t": {}})["t"]
        assert f"compare with {control}" in sentence
    doubts = Doubts(make_method("mona", {}))
    doubts.watch(rows, {"t": draw.normal(size=300)}, lengths)
    assert doubts._found({"t": {}}) == {"t": []}


def test_a_direction_that_the_pool_has_anyway() -> None:
    draw = np.random.default_rng(0)
    common = np.asarray([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]) * 9
    drifts = common + 0.1 * draw.normal(size=(300, 3, 3))
    rows = RowBatch(np.arange(300), np.ones(300, bool), {"nait": list(drifts)})
    nait = make_method("nait", {})
    for exemplars, warned in (
        (drifts[:9], True),
        (drifts[:9] * [[-1, 0.2, 9]] + [[[0, 0, 0], [5, 0, 0], [0, 60, 0]]], False),
    ):
        doubts = Doubts(nait)
        target = nait.fit(RowBatch(np.arange(9), np.ones(9, bool), {"nait": list(exemplars)}))
        for start in range(0, 300, 100):
            doubts.watch(
                rows.take(np.arange(start, start + 100)), {"t": draw.normal(size=100)}, draw.integers(1, 9, 100)
            )
        found = doubts._found({"t": target})["t"]
        assert any("mean drift of the pool's own rows" in one for one in found) == warned


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_rank_correlation_shares_ties(pairs: list[tuple[int, int]]) -> None:
    a, b = np.asarray(pairs, dtype=np.float64).T

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.asarray([np.mean([i + 1 for i, v in enumerate(sorted(values)) if v == one]) for one in values])

    got, one, other = spearman(a, b), ranks(a), ranks(b)
    want = np.corrcoef(one, other)[0, 1] if one.std() and other.std() else 0.0
    assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 999, 2000])
def test_thinning_is_even_and_bounded(batch: int) -> None:
    total = 5000 if batch == 1 else 60_001
    most = 700 if batch == 1 else MOST_SCORES // 10
    thinned = _Thinned(most, _take_columns, _join_columns)
    for start in range(0, total, batch):
        rows = np.arange(start, min(start + batch, total))
        thinned.add({"x": rows}, len(rows))
    (columns,) = thinned.all()
    kept = columns["x"]
    assert most // 2 - 1 <= len(kept) <= most and kept.tolist() == list(range(0, total, thinned.step))


def test_rows_looked_at_are_spread_over_the_whole_pool() -> None:
    """Not those of the last batches alone: a pool may be sorted by source."""
    doubts = Doubts(make_method("nait", {}))
    for start in range(0, 2000, 100):
        rows = RowBatch(np.arange(start, start + 100), np.ones(100, bool), {"nait": list(np.ones((100, 1, 2)))})
        doubts.watch(rows, {"t": np.ones(100)}, np.ones(100))
    (kept,) = doubts._rows.all()
    assert len(kept) <= MOST_ROWS and np.ptp(np.diff(kept.index)) == 0 and kept.index[-1] >= 1900
