"""Instruction Mining on stand-ins for its reward model and UniEval, against its rules in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from encoders import write_encoder
from families import tiny_tokenizer
from indicators import SMALL, write_reward, write_unieval
from tiny import chat
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
)

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.methods import make_method
from hf_neuronselect.methods.instruction_mining import neighbour_distance

TALKS = [
    ("why is it", "so"),
    ("a", "because of b"),
    ("hm", "z z z"),
    ("count", "1 2 3 4 5 6"),
    ("x y", "no"),
    ("q", "r" * 30),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("indicators")
    write_reward(folder / "reward", seed=3)
    write_unieval(folder / "unieval", seed=3)
    return {name: str(folder / name) for name in ("reward", "unieval")}


def pool() -> Dataset:
    return Dataset.from_list([{"messages": chat(q, a)} for q, a in TALKS])


@torch.no_grad()
def slow_reward(folder: str, question: str, answer: str) -> float:
    """One row at a time, in float64, of a tokenizer that joins two texts."""
    model = LlamaForSequenceClassification.from_pretrained(folder).double().eval()
    ids = tiny_tokenizer()(question, answer)["input_ids"]
    return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


@torch.no_grad()
def slow_unieval(folder: str, text: str) -> float:
    model = T5ForConditionalGeneration.from_pretrained(folder).double().eval()
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
    yes, no = (logits[tokenizer("Yes", add_special_tokens=False)["input_ids"][0]].exp(),
               logits[tokenizer("No", add_special_tokens=False)["input_ids"][0]].exp())  # fmt: skip
    return float(yes / (yes + no))


def scores(selection: Any) -> np.ndarray:
    return np.asarray(selection.scores.column("score").to_numpy(zero_copy_only=False))


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_the_third_rule(batch_tokens: int, models: dict[str, str]) -> None:
    selector = NeuronSelector("instruction-mining", **models)
    extractor = NeuronFeatureExtractor.from_options(
        ExtractionOptions(batch_tokens=batch_tokens), selector.method.signals
    )
    rows = Dataset.from_list([*pool(), {"messages": chat("nobody", "x")[:1]}])
    selection = selector.select(rows, k=3, extractor=extractor)
    got = scores(selection)
    want = []
    for q, a in TALKS:
        und = slow_unieval(
            models["unieval"], f"question: Is this an understandable response in the dialogue? </s> response: {a}"
        )
        nat = slow_unieval(
            models["unieval"], f"question: Is this a natural response in the dialogue? </s> response: {a}"
        )
        coh = slow_unieval(
            models["unieval"],
            f"question: Is this a coherent response given the dialogue history? </s> response: {a} </s> dialogue history: {q}",
        )
        loss = 0.0274 - 0.0078 * slow_reward(models["reward"], q, a) + 0.4421 * und - 0.3212 * nat - 0.1520 * coh
        want.append(-loss)
    np.testing.assert_allclose(got[:-1], want, rtol=1e-4)
    assert np.isnan(got[-1])
    assert selection.indices.tolist() == np.argsort(-np.asarray(want), kind="stable")[:3].tolist()  # the lowest losses
    assert selector.method.stand_in(extractor.extraction) == "reward, unieval"
    assert selection.provenance.method.options["reward"] == "reward"


def test_the_first_rule_looks_at_neighbours_in_the_pool(models: dict[str, str], tmp_path: Path) -> None:
    selector = NeuronSelector("instruction-mining", version="v1", reward=models["reward"])
    options = ExtractionOptions(encoder=str(write_encoder(tmp_path / "sbert")))
    extractor = NeuronFeatureExtractor.from_options(options, selector.method.signals)
    selection = selector.select(pool(), k=2, extractor=extractor)
    columns = extractor(pool()[:])
    vectors = np.asarray(columns["embedding"], np.float64)
    want = []
    for i, (q, a) in enumerate(TALKS):
        away = sorted(float(np.sqrt(((vectors[i] - other) ** 2).sum())) for j, other in enumerate(vectors) if j != i)
        knn = away[min(6, len(away)) - 1]
        length = float(columns["n_answer_tokens"][i])
        want.append(-(1.0694 - 0.1498 * slow_reward(models["reward"], q, a) + 8.257e-5 * length - 0.9350 * knn))
    np.testing.assert_allclose(scores(selection), want, rtol=1e-5)
    assert selector.method.stand_in(extractor.extraction) == "reward, sbert"


def test_neighbours_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(23, 5)).astype(np.float32)
    vectors[7] = vectors[3]
    away = np.sqrt(((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(axis=2))
    want = np.sort(away, axis=1)[:, 6]  # the first is itself
    for block in (4, 512):
        monkeypatch.setattr("hf_neuronselect.methods.instruction_mining._BLOCK", block)
        np.testing.assert_allclose(neighbour_distance(vectors), want, atol=1e-6)
    assert np.isnan(neighbour_distance(vectors[:1])).all()
    assert neighbour_distance(vectors[:3]).tolist() == pytest.approx(away[:3, :3].max(axis=1).tolist())


def test_indicators_of_the_pools_own_columns() -> None:
    rows = pool()
    values = {name: np.linspace(0.1, 0.9, len(TALKS)) ** power for name, power in zip(
        ("reward", "und", "nat", "coh"), (1, 2, 3, 0.5), strict=True)}  # fmt: skip
    for name, column in values.items():
        rows = rows.add_column(name, column)
    found = NeuronSelector("instruction-mining", reward="column", unieval="column").select(rows, k=1)
    want = -(
        0.0274 - 0.0078 * values["reward"] + 0.4421 * values["und"] - 0.3212 * values["nat"] - 0.1520 * values["coh"]
    )
    np.testing.assert_allclose(scores(found), want, rtol=1e-12)
    for bad, words in (
        (rows.remove_columns("nat"), "no column nat"),
        (rows.remove_columns("coh").add_column("coh", ["a"] * len(TALKS)), "column coh must hold numbers"),
    ):
        with pytest.raises(NeuronSelectError, match=words):
            NeuronSelector("instruction-mining", reward="column", unieval="column").select(bad, k=1)


def test_models_that_are_no_indicators_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "lm")
    LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).save_pretrained(tmp_path / "three")
    for name in ("lm", "three"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    for name, words in (("lm", "lacks score.weight: it is no reward model"), ("three", "gives 3 numbers a text")):
        method = make_method("instruction-mining", models | {"reward": str(tmp_path / name)})
        extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), method.signals)
        with pytest.raises(NeuronSelectError, match=words):
            extractor(pool()[:])
    for options, option in (({}, "reward"), ({"reward": "column"}, "unieval")):
        with pytest.raises(NeuronSelectError, match="HF_HUB_OFFLINE") as error:
            make_method("instruction-mining", options).check()
        assert error.value.option == option
