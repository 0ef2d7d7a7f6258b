"""The causal check: named features by hand, matched random ones, words for each outcome, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny import chat, make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.cli.main import main
from hf_neuronselect.core.intervals import Interval, paired_difference_of
from hf_neuronselect.explain.causal import CausalCheck
from hf_neuronselect.models.ablation import Activity
from hf_neuronselect.selection.causal import random_sets
from hf_neuronselect.selection.evidence import Evidence


@pytest.fixture(scope="module")
def selection(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> Selection:
    return NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=9)


def test_the_features_are_those_that_explain_the_picks(selection: Selection, target: Dataset) -> None:
    found = selection.causal_check(4, draws=3)
    shares = np.zeros(96)
    for i in range(9):
        why = selection.explainer().reasons(i)
        shares[why.ids] += why.amounts / why.amounts.sum() / 9
    best = np.argsort(-shares, kind="stable")[:4]
    assert [one.feature for one in found.features] == best.tolist()
    assert [one.share for one in found.features] == pytest.approx(shares[best].tolist())
    assert (found.picks, found.rows, len(found.draws)) == (9, len(target), 3)
    assert np.mean(found.draws) == pytest.approx(found.random_rise.value)
    assert found.above.value == pytest.approx(found.rise.value - found.random_rise.value)  # type: ignore[operator]
    told = str(found)
    assert "Does t use the 4 features that explain the best 9 picks of mona?" in told and "Verdict: " in told
    assert "Note: these rows are not held out: --held-out ROWS takes others of the task." in told
    assert "Note: 6 rows are too few: an interval over them is too narrow." in told
    mixed = Dataset.from_list([*target.select_columns("messages"), {"messages": chat("q", "")}])
    (few,) = selection.causal_check(4, draws=1, held_out=mixed).notes
    assert few.startswith("6 rows are too few") and "(1 are left out, the first for: " in few


def test_the_model_reads_the_picks_in_batches(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    read, of = list[list[int]](), Evidence._texts
    monkeypatch.setattr(Evidence, "_texts", lambda self, numbers: read.append(list(numbers)) or of(self, numbers))
    selection.causal_check(4, draws=1)
    assert read == [selection.indices.tolist()]


def test_the_same_whatever_the_batch_and_after_a_trip_to_disk(
    selection: Selection, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: Any
) -> None:
    given = {"held_out": rows(12, seed=3), "exemplars": target}
    found = selection.causal_check(4, draws=3, **given)
    assert not found.notes and found.rows_are == "held-out rows" and found.rows == 12
    assert selection.causal_check(4, draws=3, **given) == found
    assert selection.causal_check(4, draws=3, seed=1, **given).rise.value == pytest.approx(found.rise.value)
    monkeypatch.setattr("hf_neuronselect.selection.causal._BATCH_TOKENS", 1)
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s").causal_check(4, draws=3, extractor=extractor, **given)
    assert again.rise.value == pytest.approx(found.rise.value, abs=1e-6)
    assert again.draws == pytest.approx(found.draws, abs=1e-6)


# ------------------------------------------------------------------------------------------ random features
def test_random_features_are_like_the_named_ones_and_add_as_much() -> None:
    draw = np.random.default_rng(0)
    size, rate = np.exp(draw.normal(size=400)), draw.uniform(0.01, 1, 400)
    size[:3], rate[390:] = (40.0, 30.0, 20.0), 0.0
    named = np.asarray([0, 1, 2, 50, 51])
    sets = random_sets(named, Activity(size, rate), 20, 7)
    assert len({tuple(one) for one in sets}) == 20, "draws differ"
    for one in sets:
        assert len(set(one.tolist())) == len(one) and not set(one.tolist()) & set(named.tolist())
        assert (rate[one] > 0).all()
        assert size[one].sum() == pytest.approx(size[named].sum(), rel=0.1)
    again = random_sets(named, Activity(size, rate), 20, 7)
    assert all(np.array_equal(one, other) for one, other in zip(sets, again, strict=True))
    # one that has equals gets one of the nearest
    alone = random_sets(np.asarray([50]), Activity(size, rate), 50, 0)
    far = np.abs(np.log(size / size[50])) + np.abs(np.log(np.maximum(rate, 1e-30) / rate[50]))
    far[50] = np.inf
    near = set(np.argsort(far)[:8].tolist())
    assert all(one[0] in near for one in alone) and len({int(one[0]) for one in alone}) > 4


def test_too_few_other_features() -> None:
    with pytest.raises(NeuronSelectError, match=r"k=3: only 2 other features are active on these rows.*lower it"):
        random_sets(np.arange(3), Activity(np.ones(9), np.asarray([1.0] * 5 + [0.0] * 4)), 2, 0)


def test_differences_are_paired_by_row() -> None:
    base = np.random.default_rng(0).normal(0, 10, 50)
    found = paired_difference_of(base + 1, np.stack([base, base + 0.1]))
    assert found.value == pytest.approx(0.95) and 0.85 <= found.low <= found.high <= 1.05  # type: ignore[operator]


# ------------------------------------------------------------------------------------------ words
@pytest.mark.parametrize(
    ("above", "rise", "taken", "words"),
    [
        ((0.5, 0.2, 0.8), (0.6, 0.3, 0.9), 0.1, "used: without these features the loss"),
        ((0.5, 0.2, 0.8), (0.6, 0.3, 0.9), 0.4, "4.0 times as much of the activation"),
        ((0.0, -0.2, 0.2), (0.6, 0.3, 0.9), 0.1, "random features of like activity hurt as much"),
        ((0.0, -0.2, 0.2), (0.0, -0.1, 0.1), 0.1, "the loss does not rise without these features"),
        ((-0.5, -0.8, -0.2), (0.6, 0.3, 0.9), 0.1, "hurt more than these"),
    ],
)
def test_verdicts(above: tuple[float, ...], rise: tuple[float, ...], taken: float, words: str) -> None:
    found = CausalCheck(
        method="m", target="t", features=(), picks=1, rows=2, rows_are="rows", loss=Interval(1.0, 1.0, 1.0),
        rise=Interval(*rise), random_rise=Interval(0.1, 0.1, 0.1), above=Interval(*above), draws=(0.1,), random_features=3.0,
        taken=taken, random_taken=0.1,
    )  # fmt: skip
    assert words in found.verdict and found.verdict in str(found)
    assert found.verdict.startswith("used" if found.outcome == "used" else "not shown")


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("k", "given", "words"),
    [
        (0, {}, "k=0: must be at least 1"),
        (4, {"draws": 0}, "draws=0: must be at least 1"),
        (90, {}, "other features are active on these rows, too few to compare with"),
        (4, {"held_out": rows(1)}, r"held_out='1 usable row\(s\)': at least 2 rows with an answer"),
        (4, {"held_out": Dataset.from_list([{"messages": chat("q", "")}] * 5)}, r"at least 2 rows .*\(.*\)"),
        (4, {"held_out": Dataset.from_list([{"x": 1}] * 5)}, "columns missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked(selection: Selection, k: int, given: dict[str, Any], words: str) -> None:
    with pytest.raises(NeuronSelectError, match=words):
        selection.causal_check(k, **given)


@pytest.mark.parametrize("method", ["nait", "hidden", "longest"])
def test_methods_without_features_are_refused(method: str, pool: Dataset, target: Dataset, tiny_folder: Path) -> None:
    selector = NeuronSelector(method)
    extractor = make_extractor(tiny_folder, features=selector.signals)
    found = selector.fit({"t": target}, extractor=extractor).select(pool, k=4)
    with pytest.raises(NeuronSelectError, match="does not score by features of an SAE: select by a method"):
        found.causal_check(4, held_out=target)


@pytest.mark.parametrize(
    ("method", "options"), [("igds", {"tau": 0.3, "measure": "loss", "top_k": 2}), ("sae-diversity", {})]
)
def test_other_methods_that_score_by_features(
    method: str,
    options: dict[str, Any],
    pool: Dataset,
    target: Dataset,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    selector = NeuronSelector(method, **options)
    extractor = make_extractor(tiny_folder, features=selector.signals)
    found = selector.fit({"t": target}, extractor=extractor).select(pool, extractor=extractor, k=4)
    check = found.causal_check(2, draws=2, held_out=target, extractor=extractor)
    assert 1 <= len(check.features) <= 2 and check.method == method


def test_without_exemplars_or_a_model_it_says_what_to_give(
    selection: Selection, target: Dataset, tmp_path: Path, monkeypatch: Any, capsys: Any, tiny_folder: Path
) -> None:
    selection.save_pretrained(tmp_path / "s")
    with pytest.raises(NeuronSelectError, match="answers of the task are needed: give its exemplars, NAME=ROWS"):
        Selection.from_pretrained(tmp_path / "s").causal_check(4)
    target.to_json(tmp_path / "t.jsonl")
    words = ["explain", str(tmp_path / "s"), "--causal", "4", "--draws", "2", "--held-out", str(tmp_path / "t.jsonl")]
    monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "not on the Hub: name its folder" in capsys.readouterr().err
    folders = ["--model", str(tiny_folder / "model"), "--sae", str(tiny_folder / "sae")]
    monkeypatch.setattr(sys, "argv", ["neuronselect", *words, *folders])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and "Loss on the answers of 6 held-out rows" in capsys.readouterr().out
