"""Methods of three kinds: text alone, losses, and those that look at the whole pool; and every stage of a method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from tiny import chat, rows

from hf_neuronselect import (
    Method,
    NeuronFeatureExtractor,
    NeuronSelectError,
    NeuronSelector,
    NeuronSelectWarning,
    PoolMethod,
    Signal,
    register_method,
)
from hf_neuronselect.core.options import opt
from hf_neuronselect.methods import METHODS
from hf_neuronselect.methods.base import Target
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.text import TextSignal


@pytest.fixture
def registered() -> Iterator[None]:
    """Methods registered in a test are forgotten after it."""
    before = set(METHODS.names())
    yield
    for name in set(METHODS.names()) - before:
        METHODS.remove(name)


# ------------------------------------------------------------------------------------------ losses
def nll(model: Any, ids: list[int], first: int) -> float:
    """Mean loss of the tokens from ``first`` on, one row at a time, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    losses = [-torch.log_softmax(logits[i - 1], dim=-1)[ids[i]].item() for i in range(first, len(ids))]
    return float(np.mean(losses))


def test_ifd_is_the_ratio_of_two_losses() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    extractor = NeuronFeatureExtractor.from_model(model, tokenizer, features=["answer_loss", "answer_alone_loss"])
    pool = Dataset.from_list(
        [{"messages": chat(q, a)} for q, a in (("2+2?", "four"), ("Why?", "blue sky"), ("x", "y z"))]
    )
    selection = NeuronSelector("ifd").select(pool, ratio=1.0, extractor=extractor)
    wanted = []
    for row in pool["messages"]:
        # One token a character: <s> <|im_start|> role newline text <|im_end|> newline
        text = tokenizer.apply_chat_template(row, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row[1]["content"], add_special_tokens=False)["input_ids"]
        end = len(ids) - 2
        start = end - len(answer)
        assert ids[start:end] == answer
        alone = tokenizer("### Response:" + row[1]["content"])["input_ids"]
        wanted.append(nll(model, ids[:end], start) / nll(model, alone, len(alone) - len(answer)))
    got = selection.scores.column("score").to_numpy(zero_copy_only=False)
    wanted = np.where(np.asarray(wanted) <= 1, wanted, np.nan)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    kept = np.flatnonzero(~np.isnan(wanted))
    assert sorted(selection.indices.tolist()) == kept.tolist()


def test_rows_without_an_answer_have_no_ifd() -> None:
    extractor = NeuronFeatureExtractor.from_model(tiny_model("llama"), tiny_tokenizer(), features=["answer_loss"])
    pool = Dataset.from_list([{"messages": chat("a", "b c d")}, {"messages": chat("a", "b")[:1]}])
    got = extractor(pool[:])
    assert got["neuron_skip"][1] == "error: no assistant turn to pool"
    assert np.isnan(got["answer_loss"][1]) and np.isfinite(got["answer_loss"][0])


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_losses_do_not_depend_on_the_batch(batch_tokens: int, tiny_folder: Path) -> None:
    features = ["answer_loss", "answer_alone_loss"]
    one = NeuronFeatureExtractor.from_pretrained(str(tiny_folder / "model"), features=features)
    other = NeuronFeatureExtractor.from_pretrained(
        str(tiny_folder / "model"), features=features, batch_tokens=batch_tokens
    )
    a, b = one(rows(9)[:]), other(rows(9)[:])
    for name in features:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)


# --------------------------------------------------------------------------------------- pool-wide
@dataclass(frozen=True)
class Rare(PoolMethod):
    """The share of a row's words that few rows of the pool hold."""

    name = "rare"
    signals = ("text",)
    needs_target = False

    most: int = opt(1, "Rows that may hold a rare word.", minimum=1)

    def start(self) -> dict[str, int]:
        return {}

    def observe(self, state: dict[str, int], rows: RowBatch) -> None:
        for text in rows["text"]:
            for word in set(text.split()):
                state[word] = state.get(word, 0) + 1

    def finish(self, state: dict[str, int], targets: Mapping[str, Target]) -> Mapping[str, Target]:
        rare = sorted(word for word, count in state.items() if count <= self.most)
        return {name: {**target, "rare": np.asarray(rare)} for name, target in targets.items()}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        rare = set(target["rare"].tolist())
        return np.asarray([np.mean([word in rare for word in text.split()]) for text in rows["text"]])


@dataclass(frozen=True)
class Centred(PoolMethod):
    """Dot product of hidden states, both with the pool's mean subtracted."""

    name = "centred"
    signals = ("hidden",)

    def fit(self, exemplars: RowBatch) -> Target:
        return {"mean": exemplars.dense("hidden").mean(axis=0)}

    def start(self) -> list[np.ndarray]:
        return []

    def observe(self, state: list[np.ndarray], rows: RowBatch) -> None:
        state.append(rows.dense("hidden"))

    def finish(self, state: list[np.ndarray], targets: Mapping[str, Target]) -> Mapping[str, Target]:
        pool = np.concatenate(state).mean(axis=0)
        return {name: {**target, "pool": pool} for name, target in targets.items()}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return (rows.dense("hidden") - target["pool"]) @ (target["mean"] - target["pool"])


def test_a_pool_method_sees_every_row_first(registered: None) -> None:
    register_method(Rare)
    pool = Dataset.from_dict({"text": ["a b c", "a b", "a x", "", "y z"]})
    selection = NeuronSelector("rare").select(pool, k=2)
    assert selection.indices.tolist() == [4, 2]
    np.testing.assert_array_equal(selection.scores.column("score").to_numpy(zero_copy_only=False)[[0, 1]], [1 / 3, 0])
    assert NeuronSelector("rare", most=2).select(pool, k=4).dataset["neuron_score"] == [1.0, 2 / 3, 0.5, 0.5]
    with pytest.raises(NeuronSelectError, match="looks at the whole pool before it scores"):
        NeuronSelector("rare").select(pool.to_iterable_dataset(), k=2)


def test_a_pool_method_runs_the_model_once(
    registered: None, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_method(Centred)
    seen = []
    compute = NeuronFeatureExtractor.compute

    def counted(self: NeuronFeatureExtractor, prepared: Any, *more: Any, **options: Any) -> Any:
        seen.append(len(prepared) if any(s.name == "hidden" for s in self.computed) else 0)
        return compute(self, prepared, *more, **options)

    selector = NeuronSelector("centred").fit({"t": target}, extractor=extractor)
    monkeypatch.setattr(NeuronFeatureExtractor, "compute", counted)
    selection = selector.select(pool, k=7)
    assert sum(seen) == len(pool) + 16  # 16 rows tell the size of the temporary store
    hidden = np.asarray(extractor.with_features(["hidden"])(pool[:])["hidden"])
    wanted = (hidden - hidden.mean(axis=0)) @ (selector.targets["t"]["mean"] - hidden.mean(axis=0))
    np.testing.assert_allclose(selection.scores.column("score").to_numpy(), wanted, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------- exemplars
@dataclass(frozen=True)
class Nearest(Method):
    """A score for each exemplar; each takes a row in turn."""

    name = "nearest"
    signals = ("hidden",)
    default_picker = "round-robin"

    def fit(self, exemplars: RowBatch) -> Target:
        return {"exemplars": exemplars.dense("hidden")}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return rows.dense("hidden") @ target["exemplars"].T


def test_scores_per_exemplar_are_picked_in_turns(
    registered: None, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    register_method(Nearest)
    selection = NeuronSelector("nearest").fit({"t": target}, extractor=extractor).select(pool, k=12)
    hidden, exemplars = (np.asarray(extractor.with_features(["hidden"])(d[:])["hidden"]) for d in (pool, target))
    table, taken = hidden.astype(np.float64) @ exemplars.T.astype(np.float64), []
    while len(taken) < 12:
        for i in range(table.shape[1]):
            taken.append(next(int(r) for r in np.argsort(-table[:, i], kind="stable") if int(r) not in taken))
    assert selection.indices.tolist() == taken[:12]
    np.testing.assert_allclose(selection.scores.column("score").to_numpy(), table.max(axis=1), rtol=1e-5)
    with pytest.raises(NeuronSelectError, match="order that needs the whole pool"):
        NeuronSelector("nearest").fit({"t": target}, extractor=extractor).select(pool.to_iterable_dataset(), k=3)


class Repeated(TextSignal):
    """A row's text, so many times."""

    def __init__(self, times: int) -> None:
        self.name, self.times = "repeated", times

    def of(self, conversation: Conversation) -> str:
        return conversation.content() * self.times


@dataclass(frozen=True)
class Further(Method):
    """Keeps of each exemplar a text that depends on how many there are."""

    name = "further"
    signals = ("text",)

    def further_signals(self, exemplars: RowBatch) -> tuple[Signal, ...]:
        return (Repeated(len(exemplars)),)

    def fit(self, exemplars: RowBatch) -> Target:
        assert [len(text) for text in exemplars["text"]] == [len(text) // 3 for text in exemplars["repeated"]]
        return {"lengths": np.asarray([len(text) for text in exemplars["repeated"]])}


@pytest.mark.parametrize("stream", [False, True])
def test_signals_that_depend_on_all_exemplars(registered: None, stream: bool) -> None:
    register_method(Further)
    data = Dataset.from_dict({"text": ["ab", "", "abcd", "a"]})
    with pytest.warns(NeuronSelectWarning, match="1 of 4 exemplars are left out"):
        selector = NeuronSelector("further").fit({"t": data.to_iterable_dataset() if stream else data})
    assert selector.targets["t"]["lengths"].tolist() == [6, 12, 3]


# ---------------------------------------------------------------------------------------- prepare
@dataclass(frozen=True)
class Prepared(Method):
    """Scores rows by a number that was prepared from the pool."""

    name = "prepared"
    signals = ("text",)
    needs_target = False

    best: int = opt(-1, "The row prepared for.")

    def prepare(self, pool: Any, extractor: Any, work: Path) -> Prepared:
        mark = work / "best"
        if not mark.exists():
            mark.write_text(str(len(pool) - 1))
        else:
            mark.with_name("again").touch()
        return Prepared(best=int(mark.read_text()))

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return (rows.index == self.best).astype(float)


def test_prepare_is_called_once_with_a_folder_that_stays(
    registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_neuronselect.core.digests import cache_dir

    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))  # other tests prepare pools of their own
    register_method(Prepared)
    pool = Dataset.from_dict({"text": ["a", "b", "c"]})
    for _ in range(2):
        assert NeuronSelector("prepared").select(pool, k=1).indices.tolist() == [2]
    (folder,) = (cache_dir() / "prepared").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["again", "best"]
    NeuronSelector("prepared").select(Dataset.from_dict({"text": ["a", "b", "c"]}), k=1)  # the same rows, made anew
    assert list((cache_dir() / "prepared").iterdir()) == [folder]
    NeuronSelector("prepared").select(Dataset.from_dict({"text": ["a", "b", "d"]}), k=1)
    assert len(list((cache_dir() / "prepared").iterdir())) == 2


def test_scores_of_a_wrong_shape_are_refused(registered: None) -> None:
    @register_method
    class Wrong(Method):
        name, signals, needs_target = "wrong", ("text",), False
        score = lambda self, rows, target: np.zeros(1)  # noqa: E731

    with pytest.raises(NeuronSelectError, match=r"returned scores of shape \(1,\) for 3 rows"):
        NeuronSelector("wrong").select(Dataset.from_dict({"text": ["a", "b", "c"]}), k=1)
