"""One number per block and capability in place of a drift: the same scores, a hundredth of the bytes, no mix-ups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tiny import make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.cli.app import app
from hf_neuronselect.signals.projection import Projection

OPTIONS = [
    {},
    {"normalize": True},
    {"candidate": "mean"},
    {"candidate": "last", "normalize": True},
    {"direction": "mean"},
]


def fitted(extractor: NeuronFeatureExtractor, seeds: tuple[int, ...] = (1,), **params: object) -> NeuronSelector:
    targets = {f"t{seed}": rows(6, seed=seed) for seed in seeds}
    return NeuronSelector("nait", **params).fit(targets, extractor=extractor)


@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_scores_are_those_of_the_drifts(params: dict, pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selector = fitted(extractor, (1, 2), **params)
    whole = selector.score(pool, extractor=extractor)
    narrow = extractor.with_features(selector.compact_signals())
    projected = pool.map(narrow, batched=True)
    names = sorted(signal.name for signal in selector.compact_signals())
    assert sorted(name for name in projected.column_names if "_on_" in name) == names and len(names) == 2
    selector.extractor = None  # nothing but the columns
    got = selector.score(projected)
    for name in ("neuron_score_t1", "neuron_score_t2"):
        np.testing.assert_allclose(got[name], whole[name], rtol=2e-5, atol=1e-6)
    kept = NeuronSelector.select(selector, projected, k=9).dataset
    assert not [name for name in kept.column_names if "_on_" in name]


def test_a_projection_is_the_dot_product_of_each_block(pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selector = fitted(extractor)
    (column,) = (signal.name for signal in selector.compact_signals())
    drifts = np.asarray(extractor.with_features(["nait"])(pool[:8])["nait"], dtype=np.float64)
    got = np.asarray(extractor.with_features(selector.compact_signals())(pool[:8])[column])
    assert got.dtype == np.float32 and got.shape == drifts.shape[:2]
    want = (drifts * selector.targets["t1"]["directions"]).sum(axis=2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_batch_size_moves_nothing(pool: Dataset, extractor: NeuronFeatureExtractor, tiny_folder: Path) -> None:
    selector = fitted(extractor)
    (column,) = (signal.name for signal in selector.compact_signals())
    one, many = (
        np.asarray(
            make_extractor(tiny_folder, batch_tokens=n).with_features(selector.compact_signals())(pool[:])[column]
        )
        for n in (1, 4096)
    )
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)


def run(*words: str | Path) -> None:
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def said(tiny_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """A pool, exemplars and two capabilities as files."""
    rows(40).to_json(tmp_path / "pool.jsonl")
    for name, seed in (("a", 1), ("b", 2)):
        rows(6, seed=seed).to_json(tmp_path / f"{name}.jsonl")
        run("fit", "--method", "nait", "--model", tiny_folder / "model", "--target", tmp_path / f"{name}.jsonl",
            "--out", tmp_path / f"cap-{name}")  # fmt: skip
    return {"model": tiny_folder / "model", "here": tmp_path, "pool": tmp_path / "pool.jsonl"}


def test_a_store_of_projections_selects_what_a_store_of_drifts_does(said: dict[str, Path]) -> None:
    here, given = said["here"], ("--pool", said["pool"], "--model", said["model"])
    run("extract", *given, "--method", "nait", "--out", here / "drifts")
    run("extract", *given, "--capability", here / "cap-a", "--capability", here / "cap-b", "--out", here / "narrow")
    for name in "ab":
        for store in ("drifts", "narrow"):
            run("select", *given, "--method", "nait", "--target", f"capability:{here / f'cap-{name}'}", "--k", 7,
                "--features", here / store, "--out", here / f"{store}-{name}")  # fmt: skip
        one, two = (Selection.from_pretrained(here / f"{store}-{name}") for store in ("drifts", "narrow"))
        assert one.indices.tolist() == two.indices.tolist() and len(one) == 7
    size = {name: sum(p.stat().st_size for p in (here / name).glob("nait*/*.parquet")) for name in ("drifts", "narrow")}
    assert size["narrow"] < size["drifts"] / 2


def test_a_capability_the_store_was_not_made_for_is_refused(said: dict[str, Path]) -> None:
    here, given = said["here"], ("--pool", said["pool"], "--model", said["model"])
    run("extract", *given, "--capability", here / "cap-a", "--out", here / "narrow")
    words = ("--method", "nait", "--target", f"capability:{here / 'cap-b'}", "--features", here / "narrow", "--k", 7)
    with pytest.raises(NeuronSelectError, match="projections on other directions"):
        run("select", *given, *words, "--out", here / "sel")
    run("extract", *given, "--capability", here / "cap-b", "--out", here / "narrow")  # beside the first
    run("select", *given, *words, "--out", here / "sel")
    selector = NeuronSelector.from_pretrained(here / "cap-b")
    other = NeuronSelector.from_pretrained(here / "cap-a")
    extractor = NeuronFeatureExtractor.from_pretrained(str(said["model"]), features=[])
    projected = rows(9).map(extractor.with_features(other.compact_signals()), batched=True)
    with pytest.raises(NeuronSelectError, match="projections on other directions"):
        selector.score(projected)


def test_a_store_of_another_extraction_is_refused(said: dict[str, Path]) -> None:
    """The same directions on rows cut at another length are other numbers."""
    here, given = said["here"], ("--pool", said["pool"], "--model", said["model"])
    selector = NeuronSelector.from_pretrained(here / "cap-a")
    short = NeuronFeatureExtractor.from_pretrained(str(said["model"]), features=[], max_length=16)
    projected = rows(9).map(short.with_features(selector.compact_signals()), batched=True)
    with pytest.raises(NeuronSelectError, match="another extraction"):
        selector.score(projected)
    with pytest.raises(NeuronSelectError, match="the options here make"):
        run("extract", *given, "--max-length", 64, "--capability", here / "cap-a", "--out", here / "x")
    assert not (here / "x").exists()


def test_what_cannot_be_made_smaller_or_does_not_fit_is_refused(said: dict[str, Path], tiny_folder: Path) -> None:
    here, given = said["here"], ("--pool", said["pool"], "--model", said["model"])
    run("fit", "--method", "hidden", "--model", said["model"], "--target", here / "a.jsonl", "--out", here / "hid")
    with pytest.raises(NeuronSelectError, match="cannot be made smaller"):
        run("extract", *given, "--capability", here / "hid", "--out", here / "x")
    assert not (here / "x").exists()
    one, same = (Projection("nait", np.eye(4)) for _ in range(2))
    others = [
        Projection("nait", np.eye(4), normalize=True),
        Projection("nait_last", np.eye(4)),
        Projection("nait", 2 * np.eye(4)),
    ]
    assert one == same and len({one.name, *(other.name for other in others)}) == 4
    deep = make_extractor(tiny_folder).with_features([Projection("nait", np.ones((9, 32)))])
    with pytest.raises(NeuronSelectError, match="of 9 blocks, the model has 4"):
        deep(rows(2)[:])


def test_signals_and_projections_come_from_one_pass(extractor: NeuronFeatureExtractor) -> None:
    selector = fitted(extractor)
    both = extractor.with_features(["mona", *selector.compact_signals()])
    columns = both(rows(8)[:])
    assert {"mona_indices", *(signal.name for signal in selector.compact_signals())} <= set(columns)
