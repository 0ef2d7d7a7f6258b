"""Avoided targets: what is taken off, against a slow reference; what no choice of ours may move; what is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import rows

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.methods.random import gumbel
from hf_neuronselect.pickers import PICKERS
from hf_neuronselect.selection.avoid import less_avoided, standardised
from hf_neuronselect.store.store import FeatureStore, write_store

quiet = pytest.mark.filterwarnings("ignore::hf_neuronselect.NeuronSelectWarning")
FEW = {"knn": "knn(neighbours=5)", "kde": "kde(neighbours=5)"}  # with more than the pool has, no score counts
METHODS = ["mona", "nait", "polysemantic", "hidden"]


@pytest.fixture(scope="module")
def named() -> dict[str, Dataset]:
    return {name: rows(6, seed=seed) for seed, name in enumerate(("t", "u", "v"), 1)}


def avoiding(
    method: str, named: dict[str, Dataset], extractor: NeuronFeatureExtractor, weight: float = 1.0, **options: Any
) -> NeuronSelector:
    selector = NeuronSelector(method, **options)
    others = {name: data for name, data in named.items() if name != "t"}
    return selector.fit({"t": named["t"]}, avoid=others, avoid_weight=weight, extractor=extractor)


def column(selection: Selection, name: str = "score") -> np.ndarray:
    return selection.scores.column(name).to_numpy(zero_copy_only=False)


def slow_z(scores: list[float]) -> list[float]:
    """Standard deviations from the mean of what is finite, in exact fractions but for the root."""
    known = [Fraction(one) for one in scores if math.isfinite(one)]
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((one - mean) ** 2 for one in known) / len(known))
    return [float((Fraction(one) - mean) / Fraction(deviation)) if math.isfinite(one) else one for one in scores]


# ------------------------------------------------------------------------------------------ the formula
@quiet
@pytest.mark.parametrize("method", METHODS)
def test_the_score_is_the_targets_less_the_largest_of_those_avoided(
    method: str, pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    alone = {
        name: column(NeuronSelector(method).fit({name: data}, extractor=extractor).select(pool, k=3)).tolist()
        for name, data in named.items()
    }
    selection = avoiding(method, named, extractor, 0.75).select(pool, k=9)
    z = {name: slow_z(scores) for name, scores in alone.items()}
    expected = [t - 0.75 * max(u, v, 0) for t, u, v in zip(z["t"], z["u"], z["v"], strict=True)]
    np.testing.assert_allclose(column(selection), expected, rtol=1e-9, atol=1e-9)
    for name in ("u", "v"):
        np.testing.assert_allclose(column(selection, f"avoided_{name}"), alone[name], rtol=1e-12)
    best = sorted(range(len(pool)), key=lambda i: -expected[i])[:9]
    assert selection.indices.tolist() == best
    np.testing.assert_allclose(selection.dataset["neuron_score"], [expected[i] for i in best], rtol=1e-9)


@quiet
def test_what_a_seed_adds_is_added_to_the_wanted_score_alone(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    """Added to both it would cancel, and rows would hardly be drawn."""
    exact = {
        name: column(NeuronSelector("dsir", gumbel=False).fit({name: data}, extractor=extractor).select(pool, k=3))
        for name, data in named.items()
    }
    z = {name: np.asarray(slow_z(exact[name].tolist())) for name in ("u", "v")}
    for seed in (0, 1):
        drawn = column(NeuronSelector("dsir", seed=seed).fit({"t": named["t"]}, extractor=extractor).select(pool, k=3))
        selector = avoiding("dsir", named, extractor, seed=seed)
        expected = np.asarray(slow_z(drawn.tolist())) - np.maximum(np.maximum(z["u"], z["v"]), 0)
        selection = selector.select(pool, k=9)
        np.testing.assert_allclose(column(selection), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(column(selection, "avoided_u"), exact["u"], rtol=1e-12)
        np.testing.assert_allclose(selector.score(pool)["neuron_score"], expected, rtol=1e-9, atol=1e-9)


@quiet
def test_what_a_seed_adds_is_told_of_the_wanted_score_alone(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    selector = avoiding("dsir", named, extractor, seed=3)
    selection = selector.select(pool, k=9)
    noise = gumbel(3, selection.indices[:1])[0]
    told = selection.explain(0, target="t")
    assert told.says.endswith(f"; {noise:+.4g} was drawn")
    avoided = selection.explain(0, target="u")
    assert "drawn" not in avoided.says and not any("computed again" in note for note in avoided.notes)
    assert avoided.score == column(selection, "avoided_u")[selection.indices[0]]


@quiet
def test_a_row_without_a_score_has_nothing_drawn(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    words = [sum(len(turn["content"].split()) for turn in row["messages"]) for row in pool]
    selector = NeuronSelector("dsir", min_words=sorted(words)[len(words) // 2]).fit(
        {"t": named["t"]}, extractor=extractor
    )
    selection = selector.select(pool, k=3)
    missing = np.flatnonzero(np.isnan(column(selection)))
    assert 0 < len(missing) < len(pool)
    told = selection.explainer(pool=pool)
    assert "drawn" not in told.why(int(missing[0])).says
    assert told.why(int(selection.indices[0])).says.endswith("was drawn")


def test_of_several_exemplars_an_avoided_targets_best_counts_and_a_targets_share_one_scale() -> None:
    draw = np.random.default_rng(0)
    scores = {"t": draw.normal(3, 5, (40, 3)), "u": draw.normal(-2, 0.1, (40, 4))}
    found = less_avoided(scores, ["u"], 2.0)
    assert list(found) == ["t"]
    z = np.asarray(slow_z(scores["t"].ravel().tolist())).reshape(40, 3)
    lost = np.asarray(slow_z(scores["u"].max(axis=1).tolist()))
    np.testing.assert_allclose(found["t"], z - 2 * lost.clip(0)[:, None], rtol=1e-9, atol=1e-12)
    assert (lost < 0).any() and (lost > 0).any()


def test_rows_without_a_score_have_none_and_do_not_count() -> None:
    some = np.asarray([1.0, np.nan, 3.0, -np.inf, 8.0])
    found = standardised(some)
    np.testing.assert_allclose(found, slow_z(some.tolist()), rtol=1e-12)
    assert np.isnan(found[1]) and found[3] == -np.inf
    np.testing.assert_allclose(found[[0, 2, 4]], standardised(some[[0, 2, 4]]), rtol=0)
    constant = np.full(5, 0.1)
    assert standardised(constant).tolist() == [0.0] * 5
    assert np.isnan(standardised(np.full(2, np.nan))).all()
    less = less_avoided({"t": some, "u": constant}, ["u"], 1.0)["t"]
    np.testing.assert_array_equal(less, found)  # what says nothing takes nothing off


def test_nothing_avoided_leaves_raw_scores() -> None:
    scores = {"t": np.asarray([3.0, 1.0]), "u": np.asarray([0.5, 7.0])}
    found = less_avoided(scores, [], 1.0)
    assert all(found[name] is scores[name] for name in scores)


numbers = hnp.arrays(
    np.float64, (2, 12), elements=st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))
)


@given(numbers, st.floats(0.01, 100), st.floats(-1000, 1000), st.floats(0.1, 5))
def test_scale_and_place_of_raw_scores_move_nothing(
    pair: np.ndarray, scale: float, shift: float, weight: float
) -> None:
    """Whatever a method multiplies its scores by, or adds to them, for either target."""
    if (pair.max(axis=1) - pair.min(axis=1) < 0.1).any():
        return
    before = less_avoided({"t": pair[0], "u": pair[1]}, ["u"], weight)["t"]
    for moved in ({"t": scale * pair[0] + shift, "u": pair[1]}, {"t": pair[0], "u": scale * pair[1] + shift}):
        np.testing.assert_allclose(less_avoided(moved, ["u"], weight)["t"], before, rtol=1e-6, atol=1e-6)


@given(numbers, st.randoms(use_true_random=False))
def test_the_order_of_rows_moves_no_bit(pair: np.ndarray, draw: Any) -> None:
    order = list(range(pair.shape[1]))
    draw.shuffle(order)
    straight = less_avoided({"t": pair[0], "u": pair[1]}, ["u"], 1.0)["t"]
    shuffled = less_avoided({"t": pair[0, order], "u": pair[1, order]}, ["u"], 1.0)["t"]
    np.testing.assert_array_equal(shuffled, straight[order])


# --------------------------------------------------------------------------------------- what is selected
@quiet
@pytest.mark.parametrize("picker", [FEW.get(name, name) for name in sorted(PICKERS.names())])
def test_a_weight_near_nought_picks_as_if_nothing_were_avoided(
    picker: str, pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    plain = NeuronSelector("mona", picker=picker).fit({"t": named["t"]}, extractor=extractor).select(pool, k=12)
    least = avoiding("mona", named, extractor, 1e-12, picker=picker).select(pool, k=12)
    assert least.indices.tolist() == plain.indices.tolist()
    much = avoiding("mona", named, extractor, 3.0, picker=picker).select(pool, k=12)
    assert much.indices.tolist() != plain.indices.tolist()


@quiet
def test_several_targets_lose_the_same_and_are_ranked(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    wanted = {name: named[name] for name in "tu"}
    selector = NeuronSelector("mona").fit(wanted, avoid={"v": named["v"]}, extractor=extractor)
    table = selector.select(pool, k=8, aggregate="mean").scores
    assert table.column_names[:5] == ["source_index", "score", "score_t", "score_u", "avoided_v"]
    alone = {name: NeuronSelector("mona").fit({name: named[name]}, avoid={"v": named["v"]}, extractor=extractor)
             for name in "tu"}  # fmt: skip
    for name, one in alone.items():
        np.testing.assert_array_equal(table[f"score_{name}"].to_numpy(), column(one.select(pool, k=2)))


@quiet
def test_scores_and_selections_agree(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    """Columns, the extractor, a store with less than the signals, ``score`` and another budget: one score."""
    repeated = Dataset.from_list([*pool, pool[5], *named["t"].select([2])])
    selector = avoiding("nait", named, extractor)
    selection = selector.select(repeated, k=9)
    assert selection.provenance.counts.left_out == {"duplicate": 1, "leak": 1}
    np.testing.assert_array_equal(np.asarray(selector.score(repeated)["neuron_score"]), column(selection))
    mapped = repeated.map(extractor, batched=True)
    np.testing.assert_allclose(column(selector.select(mapped, k=9)), column(selection), rtol=1e-5, atol=1e-5)
    write_store(repeated, extractor.with_features(selector.compact_signals()), tmp_path / "s", pool_about={})
    store = FeatureStore(tmp_path / "s")
    assert all("_on_" in name for name in store.identities if name != "tokens")
    np.testing.assert_allclose(
        column(selector.select(repeated, k=9, features=store)), column(selection), rtol=1e-5, atol=1e-5
    )
    again = selection.rethreshold(k=4)
    assert again.indices.tolist() == selection.indices[:4].tolist()
    assert again.provenance.avoided == selection.provenance.avoided


@quiet
def test_an_avoided_exemplar_is_left_out_and_counted(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    here = Dataset.from_list([*pool, *named["u"].select([3])])
    selector = NeuronSelector("hidden").fit({"t": named["t"]}, avoid={"u": named["u"]}, extractor=extractor)
    selection = selector.select(here, k=len(here) - 1)
    assert selection.provenance.counts.leak == 1 and 60 not in selection.indices
    kept = selector.select(here, k=len(here), exclude=["duplicate"])
    assert 60 in kept.indices and kept.provenance.counts.leak == 0


# ------------------------------------------------------------------------------- what is kept and said
@quiet
def test_it_is_recorded_and_said(
    tmp_path: Path, pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    selector = avoiding("mona", named, extractor, 0.5)
    assert repr(selector) == "NeuronSelector('mona', targets: t, avoided: u, v)"
    selection = selector.select(pool, k=5)
    made = selection.provenance.avoided
    assert made is not None and made.weight == 0.5 and {name: one.used for name, one in made.targets.items()} == {
        "u": 6, "v": 6
    }  # fmt: skip
    assert list(selection.provenance.targets) == ["t"]
    assert selection.provenance.summary().avoided == made
    selection.save_pretrained(tmp_path / "s")
    card, report = ((tmp_path / "s" / name).read_text() for name in ("README.md", "report.html"))
    assert "for t, avoiding u, v (weight 0.5)." in card and "t, avoiding u, v (weight 0.5)" in report
    assert "| avoided | u, v: the score for it is taken off, times 0.5," in card
    assert pq.read_table(tmp_path / "s" / "scores.parquet").column_names[2:4] == ["avoided_u", "avoided_v"]

    again = Selection.from_pretrained(tmp_path / "s")
    assert again.provenance == selection.provenance and again.selector is not None
    assert again.selector.about() == selector.about()
    other = rows(20, seed=9)
    found = again.selector.select(other, k=4, extractor=extractor)
    np.testing.assert_array_equal(column(found), column(selector.select(other, k=4)))
    assert found.provenance.avoided == selector.select(other, k=4).provenance.avoided


@quiet
def test_a_capability_brings_what_it_avoids(
    tmp_path: Path, pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    selector = avoiding("nait", named, extractor, 2.0)
    selector.save_pretrained(tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    assert "# Capability: t, avoiding u, v (weight 2)" in card
    FeatureLibrary({"one": selector}).save_pretrained(tmp_path / "l")
    assert "| t: 6, avoiding u, v (weight 2) |" in (tmp_path / "l" / "README.md").read_text()
    text = (tmp_path / "c" / "capability.safetensors").read_bytes()
    assert named["u"][0]["messages"][0]["content"].encode() not in text
    for again in (
        NeuronSelector.from_pretrained(tmp_path / "c"), FeatureLibrary.from_pretrained(tmp_path / "l")["one"],
    ):  # fmt: skip
        assert list(again.targets) == ["t"] and list(again.avoided) == ["u", "v"] and again.avoid_weight == 2
        assert again.about() == selector.about()
        a, b = (one.select(pool, k=7, extractor=extractor) for one in (selector, again))
        np.testing.assert_array_equal(column(a), column(b))
        here = Dataset.from_list([*pool, *named["v"].select([1])])
        assert again.select(here, k=7, extractor=extractor).provenance.counts.leak == 1


def test_an_avoided_target_is_doubted_like_a_wanted_one(named: dict[str, Dataset]) -> None:
    """No exemplar of it is found: what is taken off is chance, and the record says so."""
    words = {"t": "add two numbers please", "u": "zzz qqq"}
    pool = Dataset.from_list([{"text": f"{words['t'] if i % 2 else 'sky blue why'} {i}"} for i in range(400)])
    wanted = Dataset.from_list([{"text": f"{words['t']} {i}"} for i in range(1000, 1010)])
    unseen = Dataset.from_list([{"text": f"{'abcdefghij'[i] * 3}"} for i in range(10)])
    selector = NeuronSelector("zip-fit").fit({"t": wanted}, avoid={"u": unseen})
    selection = selector.select(pool, k=5)
    made = selection.provenance.avoided
    assert made is not None and made.targets["u"].hit is not None
    assert [of for of, _ in selection.provenance.doubts if of == "u"] == ["u"] * len(made.targets["u"].doubts)


def test_fitting_again_forgets_what_was_avoided(
    pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor
) -> None:
    selector = avoiding("mona", named, extractor, 0.5)
    selector.fit({"t": named["t"]}, extractor=extractor)
    plain = NeuronSelector("mona").fit({"t": named["t"]}, extractor=extractor)
    assert (selector.avoided, selector.avoid_weight, selector.about()) == ({}, 1.0, plain.about())
    np.testing.assert_array_equal(column(selector.select(pool, k=3)), column(plain.select(pool, k=3)))


# ------------------------------------------------------------------------------------------ what is refused
def test_what_cannot_be_avoided(pool: Dataset, named: dict[str, Dataset], extractor: NeuronFeatureExtractor) -> None:
    def fit(method: str = "mona", **options: Any) -> None:
        NeuronSelector(method).fit({"t": named["t"]}, **({"avoid": {"u": named["u"]}} | options), extractor=extractor)

    for weight in (0, -1.0, math.nan, math.inf):
        with pytest.raises(NeuronSelectError) as caught:
            fit(avoid_weight=weight)
        assert str(caught.value) == (
            f"avoid_weight={weight!r}: must be a finite number above 0; without --avoid nothing is taken off"
        )
    for options, message in (
        ({"avoid": {"t": named["u"]}},
         "avoid='t': is the name of a target, too; avoid another one, or give each its own name: NAME=..."),
        ({"method": "longest"}, "avoid='u': longest scores rows without a target, so nothing can be taken off: choose a "
         "method that has one, or remove it"),
        ({"avoid": {"no name": named["u"]}}, "avoid='no name': a target's name is letters, digits, _ and -"),
        ({"avoid": {"u": Dataset.from_list([{"messages": []}])}}, "avoid='u': no exemplar can be used"),
    ):  # fmt: skip
        with pytest.raises(NeuronSelectError) as caught:
            fit(**options)
        assert str(caught.value).startswith(message)

    selector = NeuronSelector("mona").fit(named["t"], avoid=named["u"], extractor=extractor)
    assert list(selector.targets) == ["target"] and list(selector.avoided) == ["avoided"]
    message = (
        "avoid='avoided': scores are measured by the whole pool's mean and spread, which a stream does not tell: load it as "
        "a Dataset (drop streaming)"
    )
    for use in (selector.select, selector.score):
        with pytest.raises(NeuronSelectError) as caught:
            use(pool.to_iterable_dataset())
        assert str(caught.value) == message
    with pytest.raises(NeuronSelectError) as caught:
        selector.above(0.1)
    assert str(caught.value) == (
        "avoid='avoided': takes rows off by the whole pool's scores, and a filter sees a batch at a time; use "
        "select(threshold=...)"
    )
