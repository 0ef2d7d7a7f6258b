"""The store survives: a damaged or missing shard is redone, another extractor's or pool's store is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_extractor, rows
from datasets import Dataset

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.features import store

ABOUT = {"id": "pool", "commit": "content:1"}


def written(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor) -> dict:
    return store.write_store(pool, extractor, folder, pool_about=ABOUT, shard_rows=8)


def test_a_rerun_heals_and_doubles_nothing(tmp_path: Path, extractor: NeuronFeatureExtractor) -> None:
    pool = rows(30)
    written(tmp_path / "s", pool, extractor)
    whole, _ = store.read_store(tmp_path / "s", pool_about=ABOUT)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").glob("shard-*")}
    assert len(before) == 4
    (tmp_path / "s" / "shard-00001.parquet").write_bytes(before["shard-00001.parquet"][:500])
    (tmp_path / "s" / "shard-00003.parquet").unlink()
    with pytest.raises(NeuronSelectError, match="shard-00001.parquet is missing or damaged"):
        store.read_store(tmp_path / "s", pool_about=ABOUT)
    assert written(tmp_path / "s", pool, extractor)["skipped_shards"] == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").glob("shard-*")} == before
    again, _ = store.read_store(tmp_path / "s", pool_about=ABOUT)
    assert len(again) == 30 and again["mona_indices"] == whole["mona_indices"]


def test_a_stop_in_the_middle_leaves_whole_shards(
    tmp_path: Path, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, calls = rows(30), []
    real = store.os.fsync

    def stop(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(store.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "s", pool, extractor)
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "s").glob("shard-*")) == ["shard-00000.parquet", "shard-00001.parquet"]
    assert written(tmp_path / "s", pool, extractor)["skipped_shards"] == 2


def test_a_full_disk_is_one_clear_line(
    tmp_path: Path, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(NeuronSelectError, match="cannot be written: No space left on device"):
        written(tmp_path / "s", rows(10), extractor)


def test_another_store_is_refused(tmp_path: Path, tiny_folder: Path, extractor: NeuronFeatureExtractor) -> None:
    pool = rows(10)
    written(tmp_path / "s", pool, extractor)
    other = make_extractor(tiny_folder, top_k_features=3)
    with pytest.raises(NeuronSelectError, match=f"another extractor: {extractor.hash}, now {other.hash}"):
        written(tmp_path / "s", pool, other)
    with pytest.raises(NeuronSelectError, match="another pool"):
        store.write_store(pool, extractor, tmp_path / "s", pool_about={"id": "x"}, shard_rows=8)
    with pytest.raises(NeuronSelectError, match="the store is of the pool"):
        store.read_store(tmp_path / "s", pool_about={"id": "x"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(NeuronSelectError, match="not a feature store"):
        written(tmp_path / "mine", pool, extractor)
