"""Methods by losses and by models that rate rows, against slow float64 references."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Split
from datasets.splits import SplitDict, SplitInfo
from families import tiny_model, tiny_tokenizer
from tiny import chat

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.core.provenance import plain
from hf_neuronselect.methods import make_method
from hf_neuronselect.models.next_token import word_ids
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.rating import Ratings


def losses(given: list[float], alone: list[float]) -> RowBatch:
    columns = {"answer_loss": np.asarray(given, np.float32), "answer_alone_loss": np.asarray(alone, np.float32)}
    return RowBatch(np.arange(len(given)), np.ones(len(given), bool), columns)


# -------------------------------------------------------------------------------------------- ifd
def test_superfiltering_ranks_by_another_ratio() -> None:
    given, alone = [0.5, 3.0, 2.0, 1.0, 800.0], [1.0, 4.0, 1.5, 1.0, 1.0]
    rows = losses(given, alone)
    loss, ppl = (make_method("ifd", {"ratio": ratio}).score(rows, {}) for ratio in ("loss", "ppl"))
    for i, (a, b) in enumerate(zip(given, alone, strict=True)):
        assert loss[i] == pytest.approx(a / b) if a <= b else math.isnan(loss[i])
        assert ppl[i] == pytest.approx(math.exp(a) / math.exp(b)) if a <= b else math.isnan(ppl[i])
    assert loss[0] < loss[1] and ppl[0] > ppl[1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_share_of_ifd_is_of_the_rows_that_are_left(stream: bool) -> None:
    """100 rows, 60 of them dropped: 5 % of the other 40, best first; an explicit share is of all."""
    ratios = [1.5] * 60 + [0.01 * i for i in range(1, 41)]
    pool = Dataset.from_dict(
        {
            "messages": [chat(f"q{i}", f"a{i}") for i in range(100)],
            "answer_loss": ratios,
            "answer_alone_loss": [1.0] * 100,
            "neuron_skip": [""] * 100,
            "neuron_signals": ["answer_alone_loss=x,answer_loss=x"] * 100,
        }
    )
    given = pool
    if stream:
        given = pool.to_iterable_dataset()
        given.info.splits = SplitDict({"train": SplitInfo("train", num_examples=100)})
        given._split = Split.TRAIN
    found = NeuronSelector("ifd").select(given)
    assert found.indices.tolist() == [99, 98]
    assert found.provenance.budget.given() == {"k": 2}
    assert len(NeuronSelector("ifd").select(given, ratio=0.05)) == 5


# --------------------------------------------------------------------------------------- selectit
def slow_shares(model: Any, tokenizer: Any, turns: list[dict[str, str]], signal: Ratings) -> np.ndarray:
    """Each prompt from its beginning, one at a time, in float64: ``[prompts, 5]``."""
    text = "".join(
        f"{'Instruction' if turn['role'] == 'user' else 'Response'}:\n{turn['content']}\n\n" for turn in turns
    )
    found = []
    for asked in signal.asked:
        ids = tokenizer(text)["input_ids"] + tokenizer(asked + "\nRating:\n", add_special_tokens=False)["input_ids"]
        words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "12345"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()[words]
        found.append(torch.softmax(logits, dim=0).tolist())
    return np.asarray(found)


def slow_selectit(shares: np.ndarray, code: bool = False, alpha: float = 0.2) -> float:
    tokens = []
    for p in shares.tolist():
        if code:
            total = sum(math.exp(x) for x in p)
            p = [math.exp(x) / total for x in p]
        best = max(range(5), key=lambda k: p[k])
        tokens.append((best + 1) * sum(p[best] - p[k] for k in range(5) if k != best) / 4)
    mean = sum(tokens) / len(tokens)
    return mean / (1 + alpha * math.sqrt(sum((t - mean) ** 2 for t in tokens) / len(tokens)))


def rated(n: int) -> Dataset:
    return Dataset.from_list([{"messages": chat("q" * (1 + i % 4), "abc"[i % 3] * (2 + i))} for i in range(n)])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "olmoe"])
def test_ratings_are_those_of_each_prompt_alone(family: str) -> None:
    """The prompts share the row's keys and values, and give what they give alone, on any batch size."""
    model, tokenizer = tiny_model(family, max_position_embeddings=2048), tiny_tokenizer()
    pool = rated(4).add_item({"messages": chat("no answer", "x")[:1]})
    found = [
        NeuronFeatureExtractor.from_model(model, tokenizer, features=["ratings"], batch_tokens=tokens)(pool[:])
        for tokens in (1, 4096)
    ]
    assert found[0]["neuron_skip"] == [""] * 4 + ["error: no answer to rate"]
    for i in range(4):
        want = slow_shares(model, tokenizer, pool["messages"][i], Ratings())
        for one in found:
            np.testing.assert_allclose(one["ratings"][i].reshape(5, 5), want, rtol=2e-4)


def test_selectit_is_its_formula_on_every_level(tiny_folder: Path, tmp_path: Path) -> None:
    """Two models, weighted 1 to 3; a row that cannot be rated leaves the others in their places."""
    pool = rated(7)
    pool = Dataset.from_list([*pool.select(range(3)), {"messages": chat("q", "a")[:1]}, *pool.select(range(3, 7))])
    model, tokenizer = tiny_model("llama", max_position_embeddings=2048, num_hidden_layers=2), tiny_tokenizer()
    model.save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    first = tiny_model("llama", max_position_embeddings=2048)
    extractor = NeuronFeatureExtractor.from_model(first, tokenizer, features=["tokens"])
    for code in (False, True):
        selector = NeuronSelector(
            "selectit", model_2=str(tmp_path / "second"), sizes="1 3", p="code" if code else "paper"
        )
        selection = selector.select(pool, extractor=extractor)
        got = selection.scores.column("score").to_numpy(zero_copy_only=False)
        for i, row in enumerate(pool["messages"]):
            if i == 3:
                assert math.isnan(got[i])
                continue
            one, other = (slow_selectit(slow_shares(m, tokenizer, row, Ratings()), code) for m in (first, model))
            assert got[i] == pytest.approx(0.25 * one + 0.75 * other, rel=1e-3)
        assert len(selection) == 2  # 20 % of 8
        assert selection.provenance.method.options["model_2"] == "second"
        assert str(tmp_path) not in json.dumps(plain(selection.provenance))


def test_the_best_rating_counts_by_how_sure_it_is() -> None:
    sure, unsure, low = [0.0, 0.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.2, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0]
    rows = [[sure] * 5, [unsure] * 5, [sure] * 3 + [low] * 2, [low] * 5]
    stored = [np.ravel(row).astype(np.float32) for row in rows]
    batch = RowBatch(np.arange(4), np.ones(4, bool), {"ratings": stored})
    got = make_method("selectit", {}).score(batch, {})
    np.testing.assert_allclose(got, [slow_selectit(np.asarray(row)) for row in rows], rtol=1e-6)
    assert got[0] == pytest.approx(5.0) and got[0] > got[2] > got[1] > got[3]


def test_a_tokenizer_without_ratings_is_refused_before_the_model_runs() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(NeuronSelectError, match="no single token for 10, 7th"):
        word_ids(tokenizer, ["1", "10", "7th"], "Rating:\n", option="model", value="tiny")
    assert word_ids(tokenizer, ["1", "5"], "Rating:\n", option="model", value="tiny").tolist() == [
        tokenizer.convert_tokens_to_ids(word) for word in "15"
    ]


def test_selectit_says_what_is_wrong_with_its_models() -> None:
    for options, words in (
        ({"model_2": "me/none", "sizes": "7"}, "2 numbers above 0"),
        ({"sizes": "seven"}, "1 numbers above 0"),
        ({"model_3": "me/none"}, "name that one"),
    ):
        with pytest.raises(NeuronSelectError, match=words):
            make_method("selectit", options)
    with pytest.raises(NeuronSelectError, match="no such"):
        make_method("selectit", {"model_2": "./nowhere"}).check()
