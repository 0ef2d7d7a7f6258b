"""Streams that are cut, ragged or run once, and columns of media: nothing is lost, and no path leaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Audio, Dataset, Features, Image, IterableDataset, SplitDict, SplitInfo

from hf_neuronselect import NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.selection import reader

ROWS: list[dict[str, Any]] = [{"question": f"q{i}", "answer": "a" * (1 + i % 7)} for i in range(30)]


def stated(rows: int) -> IterableDataset:
    """A stream whose source states so many rows."""
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    stream.info.splits = SplitDict({"train": SplitInfo("train", num_examples=rows)})
    stream._split = "train"
    return stream


@pytest.mark.parametrize("cut", ["take", "skip", "filter", "whole"])
def test_a_ratio_is_of_the_rows_that_were_read(cut: str) -> None:
    stream = stated(30)
    part, rows = {
        "take": (stream.take(12), ROWS[:12]),
        "skip": (stream.skip(18), ROWS[18:]),
        "filter": (stream.filter(lambda row: int(row["question"][1:]) < 12), ROWS[:12]),
        "whole": (stream, ROWS),
    }[cut]
    found = NeuronSelector("random").select(part, ratio=0.25)
    want = NeuronSelector("random").select(Dataset.from_list(rows), ratio=0.25)
    assert found.dataset["question"] == want.dataset["question"]
    assert found.indices.tolist() == want.indices.tolist()


def test_a_stream_longer_than_stated_has_no_ratio() -> None:
    with pytest.raises(NeuronSelectError, match=r"more rows than its source states \(20\)"):
        NeuronSelector("random").select(stated(20), ratio=0.5)


def test_a_ragged_stream_that_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 8)
    rows = [dict(row) for row in ROWS]
    rows[3]["early"], rows[25]["late"], rows[26]["late"] = "seen", 5, {"a": 1}
    left = iter(rows)

    def generate() -> Iterator[dict[str, Any]]:
        yield from left

    got = NeuronSelector("full").select(IterableDataset.from_generator(generate), ratio=None, k=30).dataset
    assert sorted(got["question"]) == sorted(row["question"] for row in rows)
    by_question = {row["question"]: row for row in got}
    assert by_question["q3"]["early"] == "seen" and by_question["q0"]["early"] is None
    assert (by_question["q25"]["late"], by_question["q26"]["late"]) == (5, {"a": 1})


def test_an_optional_column_of_later_rows_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BATCH_ROWS", 4)
    rows = [{"instruction": "same", "output": "answer"} for _ in range(6)]
    rows[5] |= {"input": "more"}
    found = NeuronSelector("full").select(IterableDataset.from_generator(lambda: iter(rows)), k=6)
    assert sorted(found.indices.tolist()) == [0, 5]  # the others are duplicates of the first


def test_a_stream_that_breaks_is_one_line() -> None:
    def generate() -> Iterator[dict[str, Any]]:
        yield from ROWS[:5]
        raise EOFError("the archive ends here")

    with pytest.raises(NeuronSelectError, match="the stream breaks off after row 0 or later: EOFError the archive"):
        NeuronSelector("random").select(IterableDataset.from_generator(generate), k=2)


def test_a_selection_is_a_pool_like_any_other(tmp_path: Path) -> None:
    first = NeuronSelector("random").select(Dataset.from_list(ROWS), k=20)
    again = NeuronSelector("random").select(first.dataset, k=5)
    assert again.dataset.column_names == first.dataset.column_names
    assert again.dataset["question"] == [first.dataset["question"][i] for i in again.indices.tolist()]
    with pytest.warns(NeuronSelectWarning, match="source_index"):
        pool = Dataset.from_list(ROWS).add_column("source_index", list(range(30)))
        assert NeuronSelector("random").select(pool, k=5).dataset.column_names == first.dataset.column_names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["image", "images", "audio"])
def test_media_are_kept_undecoded_and_without_local_paths(tmp_path: Path, kind: str, streaming: bool) -> None:
    """The files are none that a decoder could read: decoding any of them would fail."""
    (tmp_path / "secret").mkdir()
    rows = []
    for i, row in enumerate(ROWS[:6]):
        path = tmp_path / "secret" / f"{i}.bin"
        path.write_bytes(b"content %d" % i)
        rows.append(row | {"media": [str(path)] if kind == "images" else str(path)})
    feature = {"image": Image(), "images": [Image()], "audio": Audio()}[kind]
    pool = Dataset.from_list(rows)
    pool = (
        pool.cast(Features({**pool.features, "media": feature}))
        if kind == "images"
        else pool.cast_column("media", feature)
    )
    selection = NeuronSelector("random").select(pool.to_iterable_dataset() if streaming else pool, k=4)
    selection.save_pretrained(tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"secret" not in file.read_bytes()
    table = pq.read_table(next((tmp_path / "out" / "data").glob("*.parquet")))
    for cell, index in zip(table["media"].to_pylist(), table["source_index"].to_pylist(), strict=True):
        cell = cell[0] if kind == "images" else cell
        assert cell == {"bytes": b"content %d" % index, "path": f"{index}.bin"}
