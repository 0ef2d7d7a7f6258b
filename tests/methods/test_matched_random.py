"""Random rows that match a selection's lengths and shares of answer tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning, Selection
from hf_neuronselect.core.configs import CompareConfig, SelectConfig
from hf_neuronselect.methods.matched_random import matched_rows
from hf_neuronselect.methods.random import uniform
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.methods import check_methods
from hf_neuronselect.pipelines.select import select


def decile(values: list[float], value: float) -> int:
    """How many of the nine deciles, with linear interpolation, are at most the value."""
    ordered, found = sorted(values), 0
    for part in range(1, 10):
        at = part / 10 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        # numpy's own order of operations, since a tie decides the cell
        fraction = at - low
        difference = ordered[high] - ordered[low]
        edge = ordered[low] + difference * fraction if fraction < 0.5 else ordered[high] - difference * (1 - fraction)
        found += value >= edge
    return found


def reference(
    picks: list[int], tokens: np.ndarray, answers: np.ndarray, free: np.ndarray, seed: int
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """methods.md, row by row."""
    n = len(tokens)
    inside = [i for i in range(n) if free[i] or i in picks]
    share = [float(answers[i]) / max(1, int(tokens[i])) for i in range(n)]
    cells = {
        i: (
            decile([float(tokens[j]) for j in inside], float(tokens[i])),
            decile([share[j] for j in inside], share[i]),
        )
        for i in range(n)
    }
    chance, drawn = uniform(seed, np.arange(n)), []
    for pick in picks:
        a, b = cells[pick]
        left = [i for i in range(n) if free[i] and i not in picks and i not in drawn]
        drawn.append(
            min(
                left,
                key=lambda i: (
                    (cells[i][0] - a) ** 2 + (cells[i][1] - b) ** 2,  # noqa: B023
                    abs(cells[i][0] - a),  # noqa: B023
                    cells[i],
                    chance[i],
                ),
            )
        )
    return drawn, cells


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(3, 60))
def test_matched_rows_reference(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 30, n)
    answers = (tokens * draw.random(n)).astype(int)
    free = draw.random(n) > 0.1
    picks = draw.permutation(n)[: max(1, n // 4)]
    if int(free[np.setdiff1d(np.arange(n), picks)].sum()) < len(picks):
        with pytest.raises(NeuronSelectError, match="too few to draw as many"):
            matched_rows(picks, tokens, answers, free, seed)
        return
    got = matched_rows(picks, tokens, answers, free, seed).tolist()
    wanted, _ = reference(picks.tolist(), tokens, answers, free, seed)
    assert got == wanted
    assert len(set(got)) == len(picks) and not set(got) & set(picks.tolist()) and free[got].all()


def test_matched_rows_take_the_lengths_out() -> None:
    """Picks that are long and have small shares of answers: the rows drawn are nearly the same in both."""
    draw = np.random.default_rng(0)
    tokens = draw.lognormal(4, 1, 5000).astype(int) + 1
    answers = (tokens * draw.random(5000)).astype(int)
    picks = np.argsort(-(np.log(tokens) - 2 * answers / tokens + 3 * draw.random(5000)))[:300]
    found = [matched_rows(picks, tokens, answers, np.ones(5000, bool), seed) for seed in (0, 1)]
    for drawn in found:
        assert abs(tokens[drawn].mean() / tokens[picks].mean() - 1) < 0.25
        assert abs((answers / tokens)[drawn].mean() - (answers / tokens)[picks].mean()) < 0.05
    assert abs(tokens.mean() / tokens[picks].mean() - 1) > 0.5
    assert len(np.intersect1d(*found)) < 250


def test_a_match_that_cannot_be_is_doubted(pool: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> None:
    NeuronSelector("longest").select(pool, k=15, extractor=extractor).save_pretrained(tmp_path / "first")
    matched = NeuronSelector("matched-random", selection=str(tmp_path / "first"))
    with pytest.warns(NeuronSelectWarning, match="the pool has too few other rows of their lengths"):
        matched.select(pool, extractor=extractor)


@pytest.fixture
def pool() -> Dataset:
    data = rows(40)
    return Dataset.from_list([*data, data[3]])  # the last row is a duplicate


@pytest.fixture
def first(pool: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> Path:
    selection = NeuronSelector("longest").select(pool, k=6, extractor=extractor)
    selection.save_pretrained(tmp_path / "first")
    return tmp_path / "first"


@pytest.mark.parametrize("seed", [0, 3])
def test_rows_matched_to_a_selection(pool: Dataset, first: Path, extractor: NeuronFeatureExtractor, seed: int) -> None:
    found = NeuronSelector("matched-random", selection=str(first), seed=seed).select(pool, extractor=extractor)
    columns = extractor.with_features(["answer_tokens"])(pool[:])
    free = np.ones(41, bool)
    free[40] = False
    picks = Dataset.from_parquet(str(first / "data" / "train-00000-of-00001.parquet"))["source_index"][:]
    wanted, _ = reference(list(picks), columns["n_tokens"], columns["n_answer_tokens"], free, seed)
    assert found.indices.tolist() == wanted
    fewer = NeuronSelector("matched-random", selection=str(first), seed=seed).select(pool, k=2, extractor=extractor)
    assert fewer.indices.tolist() == wanted[:2]


def test_answer_tokens_are_those_of_the_answers(pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
    found = extractor.with_features(["answer_tokens"])(pool[:])["n_answer_tokens"]
    assert found.tolist() == [len(turns[1]["content"]) for turns in pool["messages"]]  # one token a character


def test_a_selection_of_another_pool_is_refused(
    pool: Dataset, first: Path, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    matched = NeuronSelector("matched-random", selection=str(first))
    with pytest.raises(NeuronSelectError, match=r"a selection of another pool \(row \d+ differs\)"):
        matched.select(pool.select([*range(1, 41), 0]), extractor=extractor)
    with pytest.raises(NeuronSelectError, match=r"a selection of another pool \(it has 41 rows\)"):
        matched.select(Dataset.from_list([*pool, *rows(3, seed=9)]), extractor=extractor)
    for method, message in {
        "matched-random": "name the selection to match: --method matched-random:SELECTION",
        f"matched-random:{tmp_path}": "not a selection folder",
    }.items():
        with pytest.raises(NeuronSelectError, match=message):
            check_methods(SelectConfig(pool="p", out=Path("o"), method=method))


def test_on_the_command_line_and_compared(pool: Dataset, target: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    pool.to_json(tmp_path / "pool.jsonl")
    target.select_columns(["messages"]).to_json(tmp_path / "t.jsonl")
    usual: Any = {"pool": str(tmp_path / "pool.jsonl"), "target": (f"t={tmp_path / 't.jsonl'}",)}
    usual |= {"model": str(tiny_folder / "model"), "k": 5}
    picks = select(SelectConfig(**usual, method="hidden", out=tmp_path / "hidden")).indices
    config = SelectConfig(**usual, method=f"matched-random:{tmp_path / 'hidden'}", seed=2, out=tmp_path / "matched")
    matched = select(config)
    assert not set(matched.indices.tolist()) & set(picks.tolist()) and len(matched) == 5
    made = matched.provenance.method
    assert made.options == {"selection": "hidden", "seed": 2}
    assert str(made.sources["selection"].commit).startswith("content:")
    methods = f"longest,matched-random:{tmp_path / 'hidden'}"
    found = compare(CompareConfig(**usual, methods=methods, seed=2, draws=2, out=tmp_path / "compared"))
    (label,) = {one for one, _ in found.selections} - {"longest"}
    assert label == "matched-random:hidden"
    assert found.selections[label, "t"].indices.tolist() == matched.indices.tolist()


def test_a_selection_and_a_set_on_the_hub(
    hub: Hub, pool: Dataset, first: Path, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    """Named by id and, in the record, by the commit that was read; a later one is another draw."""
    for name in ("of", "set"):
        Selection.from_pretrained(first).push_to_hub(f"me/matched-{name}")
    local = NeuronSelector("matched-random", selection=str(first)).select(pool, extractor=extractor)
    online = NeuronSelector("matched-random", selection="me/matched-of").select(pool, extractor=extractor)
    assert online.indices.tolist() == local.indices.tolist()
    source = online.provenance.method.sources["selection"]
    assert source.on_hub and online.provenance.method.options["selection"] == f"me/matched-of@{source.commit}"
    again = NeuronSelector("matched-random", **online.provenance.method.options).select(pool, extractor=extractor)
    assert again.provenance.method == online.provenance.method
    chosen = NeuronSelector("subset", rows="me/matched-set").select(pool, extractor=extractor)
    assert chosen.indices.tolist() == Selection.from_pretrained(first).indices.tolist()
    option = chosen.provenance.method.options["rows"]
    assert re.fullmatch(r"me/matched-set@[0-9a-f]{40}(:.*)?", option)
    assert (
        NeuronSelector("subset", rows=option).select(pool, extractor=extractor).indices.tolist()
        == chosen.indices.tolist()
    )
    with pytest.raises(NeuronSelectError, match="me/none"):
        NeuronSelector("matched-random", selection="me/none").select(pool, extractor=extractor)
