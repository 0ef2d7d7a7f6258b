"""Methods by losses and by models that rate rows, against slow float64 references."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Split
from datasets.splits import SplitDict, SplitInfo
from families import tiny_model, tiny_tokenizer
from tiny import chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.core.provenance import plain
from hf_neuronselect.methods import make_method
from hf_neuronselect.models.next_token import word_ids
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.rating import Ratings
from hf_neuronselect.store.store import FeatureStore, write_store


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


# ------------------------------------------------------------------------------------------ deita
def two_scorers(folder: Path) -> dict[str, str]:
    """Two models with one tokenizer, saved."""
    for name, blocks in (("good", 2), ("hard", 3)):
        tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=blocks).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {"quality_scorer": str(folder / "good"), "complexity_scorer": str(folder / "hard")}


def slow_mean_rating(folder: Path, prompt: str) -> float:
    """Ratings 1 to 6 by their shares behind a prompt, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "123456"]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].double()[words]
    raised = [math.exp(x - max(logits.tolist())) for x in logits.tolist()]
    return sum((k + 1) * x for k, x in enumerate(raised)) / sum(raised)


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_deita_multiplies_two_scorers_over_the_turns(batch_tokens: int, tmp_path: Path) -> None:
    scorers = two_scorers(tmp_path)
    talks = [
        [("why", "so")],
        [("a {answer} of", "braces"), ("and", "more")],
        [("x", "y"), ("hm", "z z"), ("k", "l")],
    ]
    rows = [[turn for q, a in talk for turn in chat(q, a)] for talk in talks]
    rows[0].insert(0, {"role": "system", "content": "be brief"})
    rows.insert(1, [{"role": "user", "content": "nobody answers"}])
    selector = NeuronSelector("deita", **scorers)
    extractor = NeuronFeatureExtractor.from_options(
        ExtractionOptions(batch_tokens=batch_tokens), selector.method.signals
    )
    pool = Dataset.from_list([{"messages": turns} for turns in rows])
    with pytest.warns(NeuronSelectWarning, match="k=10000 is more than the 3 rows"):
        selection = selector.select(pool, extractor=extractor)
    got = selection.scores.column("score").to_numpy(zero_copy_only=False)
    assert math.isnan(got[1])
    for score, talk in zip(np.delete(got, 1), talks, strict=True):
        want = 0.0
        for q, a in talk:
            good = (
                "You are a helpful assistant. Please identify the quality score of the Response corresponding to the "
                f"Question. \n #Question#:\n{q}\n#Response#:\n{a} \n##Quality: "
            )
            hard = (
                "You are a helpful assistant. Please identify the complexity score of the following user query. \n"
                f"##Query: {q}  \n##Complexity: "
            )
            want += slow_mean_rating(tmp_path / "good", good) * slow_mean_rating(tmp_path / "hard", hard)
        assert score == pytest.approx(want, rel=1e-5)
    assert selector.method.stand_in(extractor.extraction) == "good, hard"
    record = selection.provenance
    assert record.method.options == {"quality_scorer": "good", "complexity_scorer": "hard"}
    assert record.method.sources["quality_scorer"].commit.startswith("content:")


def test_a_long_row_keeps_what_is_asked_of_it(tmp_path: Path) -> None:
    """Of a question beyond max_length the end is cut, not the words that ask for a rating."""
    method = make_method("deita", two_scorers(tmp_path))
    options = ExtractionOptions(max_length=160)
    extractor = NeuronFeatureExtractor.from_options(options, method.signals)
    pool = Dataset.from_list([{"messages": chat("w" * n, "a" * n)} for n in (300, 400, 3)])
    got = extractor(pool[:])
    quality = got[f"{method.signals[0].name}_values"]
    assert got["neuron_skip"] == [""] * 3
    assert quality[0] == pytest.approx(quality[1]) and quality[0] != pytest.approx(quality[2])


def test_another_scorer_is_another_signal(tmp_path: Path) -> None:
    scorers = two_scorers(tmp_path)
    one = make_method("deita", scorers).signals
    other = make_method("deita", scorers | {"quality_scorer": scorers["complexity_scorer"]}).signals
    assert one[0].name != other[0].name and one[1].name == other[1].name
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), one)
    model = NeuronFeatureExtractor.from_options(ExtractionOptions(model=scorers["quality_scorer"]), one)
    assert extractor.identity(one[1]) == model.identity(one[1])  # the extraction's own model moves nothing


def test_deitas_own_scorers_are_the_default_and_missed_first() -> None:
    with pytest.raises(NeuronSelectError, match="HF_HUB_OFFLINE is set") as error:
        make_method("deita", {}).check()
    assert error.value.option == "quality_scorer" and error.value.value == "hkust-nlp/deita-quality-scorer"


@pytest.mark.parametrize("name", ["selectit", "deita"])
def test_what_models_said_is_stored_and_read_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a store, and from columns that a map added: the same scores, and no model runs."""
    scorers = two_scorers(tmp_path)
    options = scorers if name == "deita" else {"model_2": scorers["quality_scorer"]}
    selector = NeuronSelector(name, **options)
    pool = rated(5)
    extractor = NeuronFeatureExtractor.from_options(
        ExtractionOptions(model=scorers["complexity_scorer"]), selector.signals
    )
    want = selector.select(pool, k=2, extractor=extractor)
    write_store(pool, pickle.loads(pickle.dumps(extractor)), tmp_path / "store", pool_about={})
    mapped = pool.map(extractor, batched=True, batch_size=2)

    def runs(*_: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("hf_neuronselect.signals.rating.next_logits", runs)
    again = NeuronSelector(name, **options).select(
        pool, k=2, extractor=extractor, features=FeatureStore(tmp_path / "store")
    )
    of_columns = NeuronSelector(name, **options).select(mapped, k=2)
    for other in (again, of_columns):
        found, expected = (one.scores.column("score").to_numpy() for one in (other, want))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert other.dataset.column_names == want.dataset.column_names
