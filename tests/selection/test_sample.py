"""The sample of a pool's store, and the features of a target that are told from it, against slow references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny import make_extractor, write_sae

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.explain.features import leading, snippet_of
from hf_neuronselect.explain.page_data import page_data
from hf_neuronselect.selection import sample as sampling
from hf_neuronselect.selection.reported import reported
from hf_neuronselect.selection.sample import numbers_of, sample_pool
from hf_neuronselect.signals.heat import TokenValues, unit_values
from hf_neuronselect.store.store import FeatureStore, write_store


@pytest.fixture
def store(pool: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> FeatureStore:
    write_store(pool, extractor, tmp_path / "store", pool_about={"id": "pool"}, shard_rows=16)
    return FeatureStore(tmp_path / "store")


def test_picks_and_rows_shown_are_in_the_sample_and_chance_fills_it() -> None:
    able = np.arange(0, 1000, 2)
    picks = list(range(500, 560, 2))
    numbers, drawn = numbers_of(able, picks, [2, 4], 40)
    assert set(picks[:10]) | {2, 4} <= set(numbers.tolist()) <= set(able.tolist()) and len(numbers) <= 40
    assert drawn.sum() == 28 and (np.diff(numbers) > 0).all()
    again, _ = numbers_of(able, picks, [2, 4], 40)
    assert np.array_equal(numbers, again)
    few, chance = numbers_of(np.arange(3), [1], [])
    assert few.tolist() == [0, 1, 2] and chance.all()


def test_a_sweep_counts_the_whole_pool_and_keeps_some_rows(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_ROWS", 12)
    own = {"mona": store.identities["mona"][0]}
    found = sample_pool(store, own, np.arange(60), [7, 30], [59])
    table = store.dataset("mona").with_format("numpy")[:]
    every = np.zeros((60, 96))
    for i in range(60):
        every[i, table["mona_indices"][i]] = table["mona_values"][i]
    fires = found.fires["mona"]
    assert found.signals == ("mona", "hidden") and found.signal == "mona" and fires.pool == 60
    width = len(fires.rows)
    assert np.array_equal(fires.rows, (every > 0).sum(axis=0)[:width]) and not every[:, width:].any()
    assert fires.total == pytest.approx(every.sum(axis=0)[:width]) and fires.share(10_000) == 0
    assert {7, 30, 59} <= set(found.rows.index.tolist()) and len(found.rows) == 12
    assert found.rows.index[found.picked].tolist() == [7, 30]
    sparse = found.rows.sparse("mona")
    for i, number in enumerate(found.rows.index.tolist()):
        row = np.zeros(96)
        row[sparse.row(i)[0]] = sparse.row(i)[1]
        assert np.array_equal(row, every[number])
    dense = np.stack(store.dataset("hidden").with_format("numpy")["hidden"][:])
    assert np.array_equal(found.rows.dense("hidden"), dense[found.rows.index])


def test_large_signals_make_a_smaller_sample(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"mona": store.identities["mona"][0]}
    monkeypatch.setattr(sampling, "LEAST_ROWS", 8)
    for most, rows in ((10**9, 60), (1, 8)):
        monkeypatch.setattr(sampling, "MOST_BYTES", most)
        assert len(sample_pool(store, own, np.arange(60), [7, 30], [59]).rows) == rows


def test_a_store_without_vectors(pool: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    write_store(
        pool, make_extractor(tiny_folder, features=["answer_loss"]), tmp_path / "loss", pool_about={"id": "pool"}
    )
    with pytest.raises(NeuronSelectError, match="the store has no signal with vectors"):
        sample_pool(FeatureStore(tmp_path / "loss"), {}, np.arange(60), [1])


def test_features_that_grow_most() -> None:
    target, pool = np.asarray([4.0, 1.0, 0.0, 5.0]), np.asarray([1.0, 1.0, 8.0])
    units, of_target, of_pool = leading(target, pool, 3)
    assert units.tolist() == [3, 0] and of_target == pytest.approx([0.5, 0.4]) and of_pool == pytest.approx([0.0, 0.1])
    assert not len(leading(np.zeros(2), np.zeros(2), 3)[0])


def test_a_snippet_is_around_the_strongest_token() -> None:
    text = b"the quick brown fox jumps over the lazy dog and runs"
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    values = np.zeros((len(ids), 2))
    values[20, 1], values[3, 1] = 2.0, 1.0
    found = snippet_of(lambda ids: bytes(ids).decode(), TokenValues(ids, np.arange(len(ids)), values), 1, 7)
    assert found is not None and "".join(found.pieces) == text[6:32].decode() and found.row == 7
    assert found.pieces[int(found.values.argmax())] == chr(text[20])
    assert snippet_of(lambda ids: "", TokenValues(ids, np.arange(len(ids)), values), 0, 7) is None


def test_features_of_a_target(
    pool: Dataset,
    target: Dataset,
    extractor: NeuronFeatureExtractor,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(
        "hf_neuronselect.selection.target_features.unit_values",
        lambda extractor, text, *rest: (read.append(text.content()), unit_values(extractor, text, *rest))[1],
    )
    selector = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    selection = selector.select(pool, k=9, features=store)
    found = reported(selection, examples=True)
    assert not found.unsampled and len(read) == len(set(read)) <= 16
    table = store.dataset("mona")
    every = np.zeros((60, 96))
    for i, row in enumerate(table):
        every[i, row["mona_indices"]] = row["mona_values"]
    proto = np.pad(selector.targets["t"]["prototype"], (0, 96))[:96]
    gain = proto / proto.sum() - every.mean(axis=0) / every.mean(axis=0).sum()
    best = np.argsort(-gain, kind="stable")[:8]
    assert [one.part.id for one in found.features["t"]] == best.tolist()
    for one in found.features["t"]:
        unit = one.part.id
        assert one.part.share == pytest.approx(proto[unit] / proto.sum()) and one.part.rarity == np.mean(
            every[:, unit] > 0
        )
        assert one.usual == pytest.approx(every[:, unit].sum() / every.sum())
        assert one.snippets and all(every[snippet.row, unit] > 0 for snippet in one.snippets)
    first = found.features["t"][0]
    assert first.snippets[0].row == int(every[:, first.part.id].argmax())
    # Parts of a row are told first that add most beyond an average row.
    amounts = np.minimum(every, proto)
    for number, one in found.reasons.items():
        beyond = np.where(amounts[number] > 0, amounts[number] - amounts.mean(axis=0), -np.inf)
        assert {part.id for part in one.parts} == set(np.argsort(-beyond, kind="stable")[:5].tolist())
        assert one.parts[0].rarity == np.mean(every[:, one.parts[0].id] > 0)
        assert one.parts[0].usual == pytest.approx(amounts[:, one.parts[0].id].sum() / amounts.sum())
    assert page_data(found) and "furthest above" in selection.report()


def test_without_a_store_the_model_reads_a_sample(
    pool: Dataset,
    target: Dataset,
    extractor: NeuronFeatureExtractor,
    store: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selector = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    told = reported(selector.select(pool, k=9, features=store), examples=True)
    selection = selector.select(pool, k=9)
    found = reported(selection, examples=True)  # the pool is smaller than a sample
    assert [one.part for one in found.features["t"]] == [one.part for one in told.features["t"]]
    assert not found.estimated and found.map is not None
    for number, one in told.reasons.items():
        for part, other in zip(found.reasons[number].parts, one.parts, strict=True):
            assert replace(part, usual=None) == replace(other, usual=None)
            assert part.usual == pytest.approx(other.usual, rel=1e-6)
    assert found.profile is not None and told.profile is not None
    assert [one.signal for one in found.profile.panels] == [one.signal for one in told.profile.panels]
    monkeypatch.setattr("hf_neuronselect.selection.reasons.COMPUTED_ROWS", 40)
    some = reported(selection, examples=True)
    assert some.estimated == 25  # 9 picks and 6 near misses are shown, and chance draws the rest
    assert f"estimated from {some.estimated} random rows" in selection.report()


def test_without_a_store_or_a_prototype_it_is_said(
    pool: Dataset,
    target: Dataset,
    extractor: NeuronFeatureExtractor,
    store: FeatureStore,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    selection = NeuronSelector("random").select(pool, k=9)
    found = reported(selection, examples=True)
    assert not found.features and "neuronselect extract keeps them in a store" in found.unsampled
    assert "Not shown: the signals of the pool were not kept" in selection.report()
    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=9)
    selection.pool = None
    assert "rows of the pool are needed" in reported(selection, examples=True).unsampled
    hidden = NeuronSelector("hidden").fit({"t": target}, extractor=extractor).select(pool, k=9, features=store)
    found = reported(hidden, examples=True)
    assert not found.features and not found.unsampled and len(found.reasons) == 15
    write_sae(tmp_path / "sae" / "layers.2", 32, seed=9)
    write_store(
        pool, make_extractor(tiny_folder, sae=str(tmp_path / "sae")), tmp_path / "other", pool_about={"id": "pool"}
    )
    selection.features = FeatureStore(tmp_path / "other")
    found = reported(selection, examples=True)
    assert not found.features and "another extraction" in found.unexplained


def test_pictures_of_a_selection(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore, tmp_path: Path
) -> None:
    selector = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    selection = selector.select(pool, k=9, features=store)
    found = reported(selection, examples=True)
    assert found.profile is not None and found.map is not None
    assert [(panel.signal, panel.features) for panel in found.profile.panels] == [("hidden", False), ("mona", True)]
    assert len(found.profile.panels[1].picks) == 9 and len(found.profile.panels[1].pool) == 51
    assert found.map.signal == "mona" and len(found.map.rows) == 60 and len(found.map.exemplars["t"]) == 6
    assert found.map_texts[3][:9] in selection.explainer().evidence.text_of(3).content() and len(found.map_texts) == 60
    assert len(found.exemplar_texts["t"]) == 6
    html = selection.report()
    assert (
        "Activation profiles" in html
        and "A map of the pool" in html
        and "6 exemplars by the two main directions of mona" in html
    )
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    again.features, again.selector.extractor = store, extractor  # type: ignore[union-attr]
    found = reported(again, examples=True)
    assert found.map is not None and not found.map.exemplars and set(found.map_texts) == set(again.indices.tolist())
    bare = reported(selection, examples=False)
    assert bare.map is None and bare.profile is None and not bare.map_texts


@pytest.mark.parametrize("method", ["hidden", "random", "bm25"])
def test_other_methods_have_pictures_of_what_the_store_has(
    method: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, store: FeatureStore
) -> None:
    selection = NeuronSelector(method).fit({"t": target}, extractor=extractor).select(pool, k=9, features=store)
    found = reported(selection, examples=True)
    assert found.map is not None and found.profile is not None and len(found.profile.panels) == 2
    assert found.map.signal == ("hidden" if method == "hidden" else "mona")
    assert len(found.map.exemplars) == (method == "hidden") and selection.report()
