"""Selecting: the same rows whatever the batches, the order or the stream; nothing lost, nothing said twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import chat, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning, Selection
from hf_neuronselect.core.provenance import Budget
from hf_neuronselect.selection.marks import mark_pool

METHODS = ["mona", "nait", "polysemantic", "hidden"]
quiet = pytest.mark.filterwarnings("ignore::hf_neuronselect.NeuronSelectWarning")


def fitted(method: str, target: Dataset, extractor: NeuronFeatureExtractor, **params: object) -> NeuronSelector:
    return NeuronSelector(method, **params).fit({"t": target}, extractor=extractor)


def scores_of(selection: Selection) -> np.ndarray:
    return selection.scores.column("score").to_numpy()


@quiet
@pytest.mark.parametrize("method", METHODS)
def test_columns_extractor_and_stream_agree(
    method: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    """Features mapped beforehand, computed in the same pass, or streamed: one selection."""
    direct = fitted(method, target, extractor).select(pool, k=9)
    mapped_pool, mapped_target = (d.map(extractor, batched=True, batch_size=7) for d in (pool, target))
    mapped = NeuronSelector(method).fit({"t": mapped_target}).select(mapped_pool, k=9)
    streamed = fitted(method, target, extractor).select(pool.to_iterable_dataset(), k=9)
    small = make_extractor_like(extractor, batch_tokens=1)
    one_by_one = fitted(method, target, small).select(pool, k=9)
    for other in (mapped, streamed, one_by_one):
        assert other.indices.tolist() == direct.indices.tolist()
        size = np.abs(scores_of(direct)).max()  # a score near nought is a sum of larger parts
        np.testing.assert_allclose(scores_of(other), scores_of(direct), rtol=2e-5, atol=1e-6 * max(1, size))
        assert other.dataset.column_names == direct.dataset.column_names
        assert other.dataset["messages"] == direct.dataset["messages"]
    assert streamed.scores.column("rank").null_count == len(pool) - 9


def make_extractor_like(extractor: NeuronFeatureExtractor, **options: object) -> NeuronFeatureExtractor:
    extraction = extractor.extraction
    return NeuronFeatureExtractor(
        replace(extraction, options=replace(extraction.options, **options)), extractor.signals
    )


@quiet
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), method=st.sampled_from(METHODS))
def test_row_order_moves_no_score(
    seed: int, method: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    order = np.random.default_rng(seed).permutation(20)
    selector = fitted(method, target, extractor)
    straight = scores_of(selector.select(pool.select(range(20)), k=3))
    shuffled = scores_of(selector.select(pool.select(order), k=3))
    np.testing.assert_allclose(shuffled, straight[order], rtol=2e-5, atol=1e-6)


@quiet
def test_an_appended_row_changes_no_other_score(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selector = fitted("mona", target, extractor)
    before = scores_of(selector.select(pool.select(range(30)), k=2))
    after = scores_of(selector.select(pool.select(range(31)), k=2))
    np.testing.assert_allclose(after[:30], before, rtol=2e-5)


def test_rows_come_as_they_were(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selection = fitted("mona", target, extractor).select(pool.map(extractor, batched=True), ratio=0.1)
    assert len(selection) == 6
    assert selection.dataset.column_names == [*pool.column_names, "neuron_score", "neuron_rank", "source_index"]
    for row, index in zip(selection.dataset, selection.indices, strict=True):
        assert {name: row[name] for name in pool.column_names} == pool[int(index)]
    assert (np.diff(selection.dataset["neuron_score"]) <= 0).all()
    table = selection.scores.to_pydict()
    assert table["source_index"] == list(range(len(pool)))
    assert [i for i in range(len(pool)) if table["selected"][i]] == sorted(selection.indices.tolist())
    assert sorted(table["rank"]) == list(range(len(pool)))


def test_duplicates_and_exemplars_are_left_out(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    question = "How many apples are left when Tom eats three of his eight apples?"
    exemplars = Dataset.from_list([*target.select_columns(["messages"]), {"messages": chat(question, "5")}])
    texts = [
        chat("Something else", "yes"),
        chat("Something  ELSE", "yes"),  # not the same to the letter
        chat("Something else", "yes"),
        exemplars[0]["messages"],  # an exemplar itself
        chat(question, "another answer"),  # its question
        chat(f"Here is a riddle. {question} Think.", "five"),  # holds its question
        chat("Unrelated", "no"),
    ]
    small = Dataset.from_list([{"messages": m} for m in texts])
    selector = NeuronSelector("mona").fit({"t": exemplars}, extractor=extractor)
    selection = selector.select(small, ratio=1.0)
    excluded = selection.scores.column("excluded").to_pylist()
    assert excluded == [None, None, "duplicate", "leak", "leak", "leak", None]
    assert sorted(selection.indices.tolist()) == [0, 1, 6]
    kept = selector.select(small, ratio=1.0, exclude=())
    assert len(kept) == 7
    assert selection.provenance.counts.leak == 3
    marks = mark_pool(small, {"t": selector.leakage}, extractor.extraction.options)["t"]
    for exclude in ((), ("leak",), ("duplicate",), ("leak", "duplicate")):
        alone, given = (selector.select(small, ratio=1.0, exclude=exclude, marks=one) for one in (None, marks))
        assert given.scores.equals(alone.scores)
    with pytest.raises(NeuronSelectError, match="marks of 7 rows, the pool has 5"):
        selector.select(small.select(range(5)), k=1, marks=marks)


def test_bad_rows_are_counted_and_named(target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    small = Dataset.from_list(
        [
            {"messages": chat("a question", "an answer")},
            {"messages": None},
            {"messages": chat("  ", "\n")},
            {"messages": [{"role": "wizard", "content": "hi"}]},
            {"messages": chat("another", "answer")},
        ]
    )
    selection = fitted("mona", target, extractor).select(small, ratio=1.0)
    assert selection.scores.column("excluded").to_pylist() == [None, "empty", "empty", "error", None]
    assert selection.scores.column("score").to_pylist()[1:4] == [None, None, None]
    assert sorted(selection.indices.tolist()) == [0, 4]
    counts = selection.provenance.counts
    assert (counts.empty, counts.error) == (2, 1)
    assert counts.reasons == ("row 3: messages[0] has the unknown role 'wizard'",)


def test_save_and_load(tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selection = fitted("mona", target, extractor).select(pool, k=5)
    selection.save_pretrained(tmp_path / "sel")
    loaded = load_dataset(str(tmp_path / "sel"), split="train")
    assert loaded["messages"] == selection.dataset["messages"]
    again = Selection.from_pretrained(tmp_path / "sel")
    assert again.indices.tolist() == selection.indices.tolist()
    assert again.provenance == selection.provenance
    assert again.scores.equals(selection.scores)
    text = (tmp_path / "sel" / "selection.json").read_text()
    assert str(tmp_path) not in text and "/tmp" not in text


def test_load_dataset_never_gives_another_selections_rows(
    tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    """`datasets` caches a local folder by its card: two folders of one name, or one written again, are not one."""
    selector = fitted("mona", target, extractor)
    for folder, k in ((tmp_path / "a" / "sel", 3), (tmp_path / "b" / "sel", 5), (tmp_path / "b" / "sel", 7)):
        selection = selector.select(pool, k=k)
        selection.save_pretrained(folder)
        assert load_dataset(str(folder), split="train")["source_index"] == selection.indices.tolist()


def test_selecting_twice_writes_the_same_bytes(
    tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    for name in ("a", "b"):
        fitted("mona", target, extractor).select(pool, k=5).save_pretrained(tmp_path / name)
    for file in ("data/train-00000-of-00001.parquet", "scores.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_edited_or_foreign_folder_is_refused(
    tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selection = fitted("mona", target, extractor).select(pool, k=5)
    selection.save_pretrained(tmp_path / "sel")
    data = tmp_path / "sel" / "data" / "train-00000-of-00001.parquet"
    rows = Dataset.from_parquet(str(data))
    rows.select(range(3)).to_parquet(data)
    with pytest.raises(NeuronSelectError, match=r"was changed .*3 rows in data/, 5 by selection.json"):
        Selection.from_pretrained(tmp_path / "sel")
    rows.map(lambda row: {"source": "mine"}).to_parquet(data)  # as many rows as before, other contents
    with pytest.raises(NeuronSelectError, match="was changed after selection.json was written"):
        Selection.from_pretrained(tmp_path / "sel")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(NeuronSelectError, match="not a selection folder"):
        selection.save_pretrained(tmp_path / "mine")
    with pytest.raises(NeuronSelectError, match="not a selection folder"):
        Selection.from_pretrained(tmp_path / "mine")


@quiet
@pytest.mark.parametrize("method", ["mona", "nait"])
def test_capability_round_trip(
    tmp_path: Path, method: str, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selector = fitted(method, target, extractor)
    selector.save_pretrained(tmp_path / "cap")
    assert {p.name for p in (tmp_path / "cap").iterdir()} == {"config.json", "capability.safetensors", "README.md"}
    again = NeuronSelector.from_pretrained(tmp_path / "cap")
    a, b = selector.select(pool, k=7), again.select(pool, k=7, extractor=extractor)
    np.testing.assert_array_equal(scores_of(a), scores_of(b))
    stored = (tmp_path / "cap" / "capability.safetensors").read_bytes()
    assert target[0]["messages"][0]["content"].encode() not in stored
    changed = make_extractor_like(extractor, max_length=16)
    with pytest.raises(
        NeuronSelectError, match=f"{changed.identities[method]}, the target's {extractor.identities[method]}"
    ):
        again.select(pool, k=7, extractor=changed)


def make_extractor_with_k(extractor: NeuronFeatureExtractor, k: int) -> NeuronFeatureExtractor:
    return make_extractor_like(extractor, top_k_features=k)


def test_columns_of_another_extractor_are_refused(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    other = make_extractor_with_k(extractor, 3)
    selector = NeuronSelector("mona").fit({"t": target.map(extractor, batched=True)})
    with pytest.raises(NeuronSelectError, match="must be the same"):
        selector.select(pool.map(other, batched=True), k=3)


def test_several_targets(pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
    named = {"one": rows(5, seed=2), "two": rows(5, seed=3)}
    selector = NeuronSelector("mona").fit(named, extractor=extractor)
    selection = selector.select(pool, k=10)
    assert {"neuron_score_one", "neuron_score_two"} <= set(selection.dataset.column_names)
    alone = NeuronSelector("mona").fit({"one": named["one"]}, extractor=extractor).select(pool, k=5)
    assert set(alone.indices.tolist()) <= set(selection.indices.tolist())
    stream = selector.select(pool.to_iterable_dataset(), k=10)
    assert stream.indices.tolist() == selection.indices.tolist()
    np.testing.assert_allclose(stream.dataset["neuron_score"], selection.dataset["neuron_score"], rtol=1e-9)


def test_score_above_and_filter(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    mapped = pool.map(extractor, batched=True)
    selector = NeuronSelector("mona").fit(target.map(extractor, batched=True))
    scored = selector.score(mapped)
    values = np.asarray(scored["neuron_score"])
    threshold = float(np.quantile(values, 0.8))
    kept = mapped.filter(selector.above(threshold), batched=True)
    assert kept["id"] == [i for i, v in enumerate(values) if v >= threshold]
    selected = selector.select(mapped, threshold=threshold)
    assert sorted(selected.indices.tolist()) == kept["id"]
    stream = list(selector.score(pool.to_iterable_dataset(), extractor=extractor))
    np.testing.assert_allclose([row["neuron_score"] for row in stream], values, rtol=2e-5)
    with pytest.raises(NeuronSelectError, match="already has the column 'neuron_score'"):
        selector.score(scored)


def test_rethreshold(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selection = fitted("mona", target, extractor).select(pool, k=5)
    more = selection.rethreshold(k=8)
    assert more.indices[:5].tolist() == selection.indices.tolist() and len(more) == 8
    assert more.provenance.budget == Budget(k=8) and selection.provenance.budget == Budget(k=5)


def test_explain_names_the_features_of_the_overlap(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selection = fitted("mona", target, extractor).select(pool, k=3)
    why = selection.explain(0, top=500)
    assert sum(part.share for part in why.parts) == pytest.approx(1) and why.of == len(why.parts)
    assert all(one.share >= other.share for one, other in pairwise(why.parts))
    row = extractor.with_features(["mona"])(selection.dataset[0] | {})
    values = dict(zip(row["mona_indices"].tolist(), row["mona_values"].tolist(), strict=True))
    assert all(values[part.id] == pytest.approx(part.facts["value"], rel=1e-4) for part in why.parts)
    with pytest.raises(NeuronSelectError, match="rows 0 to 2"):
        selection.explain(3)


@pytest.mark.parametrize("method", ["random", "longest", "shortest", "full"])
def test_baselines_need_no_target(method: str, pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selector = NeuronSelector(method)
    selection = selector.select(pool, ratio=0.2, extractor=extractor)
    lengths = selection.scores.column("n_tokens").to_numpy()
    picked = lengths[selection.indices]
    if method == "longest":
        assert picked.min() >= np.sort(lengths)[-12]
    elif method == "shortest":
        assert picked.max() <= np.sort(lengths)[11]
    elif method == "full":
        assert selection.indices.tolist() == list(range(12))
    else:
        assert selection.indices.tolist() != list(range(12))
        assert selector.select(pool, ratio=0.2).indices.tolist() == selection.indices.tolist()


def test_bad_input(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    selector = fitted("mona", target, extractor)
    none = pool.select([])
    cases = [
        (lambda: selector.select(none, k=1), "no rows"),
        (lambda: NeuronSelector("mona").fit({"t": none}, extractor=extractor), "no rows"),
        (lambda: NeuronSelector("mona").fit({"bad name": target}, extractor=extractor), "letters, digits"),
        (lambda: NeuronSelector("mona").select(pool, k=1), "fit a target first"),
        (lambda: NeuronSelector("mona").fit(target), "map it with a NeuronFeatureExtractor"),
        (lambda: NeuronSelector("longest").select(pool, k=1), "n_tokens"),
        (lambda: selector.select(pool.add_column("neuron_rank", [0] * len(pool)), k=1), "already has the column"),
        (lambda: selector.select([1, 2], k=1), "needs a datasets.Dataset"),
        (lambda: selector.select(pool, k=1, exclude=["twins"]), "must be one of duplicate, leak"),
        (lambda: selector.select(pool.to_iterable_dataset(), ratio=0.1), "use k"),
        (lambda: selector.select(pool.to_iterable_dataset(), max_tokens=9), "needs k or threshold"),
        (lambda: fitted("nait", target.select([0]), extractor), "at least 2 exemplars"),
        (lambda: fitted("nait", target.select([0, 0, 0]), extractor), "identical"),
        (lambda: selector.select(Dataset.from_dict({"x": [1]}), k=1), "columns missing"),
        (lambda: selector.select(Dataset.from_dict({"text": [" ", None]}), k=1), "none of the 2 rows .*2 empty"),
    ]
    for call, message in cases:
        with pytest.raises(NeuronSelectError, match=message):
            call()
    with pytest.warns(NeuronSelectWarning, match="k=500 is more than the 60 rows"):
        assert len(selector.select(pool, k=500)) == 60


def test_formats_without_messages_get_them(tmp_path: Path, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    alpaca = Dataset.from_dict(
        {"instruction": ["Add", "Sort"], "input": ["1 2", ""], "output": ["3", "done"], "neuronal": [1, 2]}
    )
    selection = fitted("mona", target, extractor).select(alpaca, ratio=1.0)
    assert "messages" not in selection.dataset.column_names
    selection.save_pretrained(tmp_path / "sel")
    found = {r["instruction"]: r["messages"] for r in load_dataset(str(tmp_path / "sel"), split="train")}
    assert found == {"Add": chat("Add\n\n1 2", "3"), "Sort": chat("Sort", "done")}
    selection.save_pretrained(tmp_path / "bare", messages=False)
    assert "messages" not in load_dataset(str(tmp_path / "bare"), split="train").column_names


def test_hostile_text_is_escaped(tmp_path: Path, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    evil = "</pre><script>alert(1)</script>"
    selection = fitted("mona", target, extractor).select(Dataset.from_dict({"text": [evil, "other text"]}), ratio=1.0)
    selection.save_pretrained(tmp_path / "sel")
    page = (tmp_path / "sel" / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page and evil not in page
