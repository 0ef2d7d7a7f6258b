"""Rows of a fixed set, found in the pool to the letter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny import chat, rows

from hf_neuronselect import NeuronSelectError, NeuronSelector, NeuronSelectWarning, Selection
from hf_neuronselect.core.configs import CompareConfig, SelectConfig
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.methods import check_methods, method_of, methods_of
from hf_neuronselect.pipelines.select import select


@pytest.fixture
def pool() -> Dataset:
    return rows(12)


@pytest.fixture
def chosen(pool: Dataset, tmp_path: Path) -> Path:
    """Four rows of the pool, in another format and order, one twice; the last differs by a capital."""
    turns = [pool[i]["messages"] for i in (7, 2, 7, 9, 4)]
    turns[-1] = chat(turns[-1][0]["content"].capitalize(), turns[-1][1]["content"])
    Dataset.from_list([{"prompt": q["content"], "completion": a["content"]} for q, a in turns]).to_json(
        tmp_path / "chosen.v1.jsonl"
    )
    return tmp_path / "chosen.v1.jsonl"


@pytest.mark.parametrize("most", [None, 2])
def test_rows_of_the_set_in_its_order(pool: Dataset, chosen: Path, most: int | None) -> None:
    with pytest.warns(NeuronSelectWarning, match=r"1 of the 4 rows of chosen.v1.jsonl are not in the pool"):
        selection = NeuronSelector("subset", rows=str(chosen)).select(pool, k=most)
    assert selection.indices.tolist() == [7, 2, 9][:most]
    scores = selection.scores.column("score").to_numpy(zero_copy_only=False)
    np.testing.assert_allclose(scores[[7, 2, 9]], [1, 0.75, 0.5])
    assert np.isnan(np.delete(scores, [7, 2, 9])).all()


def test_a_published_selection_is_a_set(pool: Dataset, tmp_path: Path) -> None:
    first = NeuronSelector("random").select(pool, k=5)
    first.save_pretrained(tmp_path / "first")
    other = pool.select([*range(6, 12), *range(6)])  # the same rows elsewhere
    found = NeuronSelector("subset", rows=str(tmp_path / "first")).select(other)
    assert [(i + 6) % 12 for i in found.indices.tolist()] == first.indices.tolist()


def test_what_cannot_be_taken_is_refused_first(pool: Dataset, tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["none of them"]}).to_json(tmp_path / "other.jsonl")
    with pytest.raises(NeuronSelectError, match="none of its 1 rows is in the pool"):
        NeuronSelector("subset", rows=str(tmp_path / "other.jsonl")).select(pool)
    Dataset.from_dict({"text": [" "]}).to_json(tmp_path / "blank.jsonl")
    for method, message in {
        "subset": "name the rows to take: --method subset:ROWS",
        f"subset:{tmp_path / 'othr.jsonl'}": "no such file or folder .did you mean",
        f"subset:{tmp_path / 'blank.jsonl'}": "no row of it can be read",
        "random:3": "has no option that names rows",
    }.items():
        with pytest.raises(NeuronSelectError, match=message):
            check_methods(SelectConfig(pool="p", out=Path("o"), method=method))
        with pytest.raises(NeuronSelectError, match=message):
            methods_of(f"longest,{method}", 0)[1].method.check()
    with pytest.raises(NeuronSelectError, match="has rows twice"):
        method_of("subset:a", {"rows": "b"}, 0)


def test_names_with_a_colon(chosen: Path) -> None:
    one, other, third = methods_of(f"subset:{chosen}, subset:me/lima@main:plain:train[:9],nait(normalize=true)", 0)
    assert (one.method.options["rows"], one.label) == (str(chosen), f"subset:{chosen.name}")
    assert other.method.options["rows"] == "me/lima@main:plain:train[:9]" and third.label == "nait(normalize=true)"
    with pytest.raises(NeuronSelectError, match="named twice"):
        methods_of(f"subset:{chosen},subset:{chosen}", 0)
    twin = chosen.parent / "twin" / chosen.name
    twin.parent.mkdir()
    twin.touch()
    assert [one.label for one in methods_of(f"subset:{chosen},subset:{twin}", 0)] == [
        f"subset:{chosen.name}",
        f"subset:{twin}",
    ]
    labels = [one.label for one in methods_of("matched-random:s(seed=1),matched-random:s(seed=2)", 0)]
    assert labels == ["matched-random:s(seed=1)", "matched-random:s(seed=2)"]


@pytest.mark.filterwarnings("ignore:1 of the 4 rows")
def test_the_record_names_no_folder_and_is_read_again(pool: Dataset, chosen: Path, tmp_path: Path) -> None:
    pool.to_json(tmp_path / "pool.jsonl")
    config = SelectConfig(pool=str(tmp_path / "pool.jsonl"), method=f"subset:{chosen}", out=tmp_path / "out")
    made = select(config).provenance.method
    assert made.options["rows"] == made.sources["rows"].id == "chosen.v1.jsonl"
    assert str(made.sources["rows"].commit).startswith("content:")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--method-option rows=chosen.v1.jsonl" in card and "- the method's rows: `chosen.v1.jsonl`" in card
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "out").glob("*.[mjh]*"))
    chosen.unlink()  # a selection can be opened, and saved again, without the set
    Selection.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert Selection.from_pretrained(tmp_path / "again").provenance.method == made


@pytest.mark.filterwarnings("ignore:1 of the 4 rows")
def test_compared_with_others(pool: Dataset, chosen: Path, target: Dataset, tmp_path: Path) -> None:
    pool.to_json(tmp_path / "pool.jsonl")
    target.select_columns(["messages"]).to_json(tmp_path / "t.jsonl")
    config: Any = {"pool": str(tmp_path / "pool.jsonl"), "target": (str(tmp_path / "t.jsonl"),), "k": 3}
    found = compare(CompareConfig(**config, methods=f"random,subset:{chosen}", out=tmp_path / "out"))
    assert found.selections["subset:chosen.v1.jsonl", "t"].indices.tolist() == [7, 2, 9]
    assert (tmp_path / "out" / "subset-chosen.v1.jsonl" / "t" / "selection.json").is_file()
